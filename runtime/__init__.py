"""What the scripts use. Nothing in here imports a script or model.py."""
