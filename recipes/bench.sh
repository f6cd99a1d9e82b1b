#!/usr/bin/env bash
# Every row of the README's speed table, about half an hour on 2 cores: bash recipes/bench.sh [FOLDER [PLAIN]]
# FOLDER takes a table and a line of JSON for each row; PLAIN is a script that trains and generates the plain way, called as
# below: without it there is nothing to compare those rows with. Run nothing beside it.
set -euo pipefail
folder=$(realpath -m "${1:-out-bench}"); plain=${2:+python $(realpath "$2")}
cd "$(dirname "$0")/.."
mkdir -p "$folder"

row() {  # name, the command to compare with or nothing, the arguments of bench.py
    name=$1 beside=$2; shift 2
    echo "$name: python bench.py $*"
    python bench.py "$@" --compare="$beside" > "$folder/$name.txt" || { echo "failed, see $folder/$name.txt"; return; }
    tail -1 "$folder/$name.txt" > "$folder/$name.json"
    grep -E '^(ms a time|times as fast|share)' "$folder/$name.txt"
}

char=config/train_shakespeare_char.py cpu=config/train_shakespeare_char_cpu.py
row train_cpu_recipe "${plain:+$plain train --preset=cpu_recipe --iters=60}" $cpu
row train_cpu_recipe_compiled "${plain:+$plain train --preset=cpu_recipe --iters=60}" $cpu --compile=True
row train_char "${plain:+$plain train --preset=char --iters=1}" $char --repeats=3
row train_char_without_dropout "" $char --dropout=0.0
row train_gpt2 "${plain:+$plain train --preset=gpt2 --iters=1}" --real_data=False --batch_size=4 --bias=True --repeats=3
row run_cpu_recipe "${plain:+$plain learn --data=data/shakespeare_char}" --what=run $cpu --repeats=3
row decode_1 hf --what=decode --real_data=False
row decode_10 hf --what=decode --real_data=False --num_samples=10
row sample_defaults "${plain:+$plain generate --preset=gpt2 --tokens=500}" --what=decode --real_data=False --num_samples=10 --max_new_tokens=500 --repeats=3
row prefill hf --what=prefill --real_data=False
row get_batch slices --what=data $char
row start "" --what=start $cpu
