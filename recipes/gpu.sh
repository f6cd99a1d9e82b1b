#!/usr/bin/env bash
# Tests and measures all that needs a GPU, in at most 9 minutes, with one call.
#
#     bash recipes/gpu.sh [FOLDER [FLAGS]]
#
# It needs Linux, bash, data/shakespeare_char and pytest.
# FOLDER (out-gpu) gets a log for each part, summary.txt,
# and results.json with the figures. A part that fails or takes too long doesn't stop the others.
# PARTS="tests bench" runs only these parts. FLAGS are added to the commands of bench.py and
# train.py. With DEVICE=cpu and flags that make the model small, the script can be tried without a
# GPU:
#
#     DEVICE=cpu bash recipes/gpu.sh out-gpu --n_layer=1 --n_head=2 --n_embd=32
set -uo pipefail
folder=$(realpath -m "${1:-out-gpu}")
flags=("${@:2}" --device="${DEVICE:-cuda}")
parts=${PARTS:-tests bench decode char quick profile}
python=$(command -v python || command -v python3)
preset=gpt2_gpu
tests="$python -m pytest -v --durations=10 -m gpu -p no:cacheprovider --device=${DEVICE:-cuda}
       tests/test_gpu.py"
iters=(--max_iters=5000 --max_iters=1000 --lr_decay_iters=1000)
if [ "${DEVICE:-cuda}" = cpu ]; then
    preset=cpu_recipe
    iters=(--max_iters=20 --max_iters=20 --lr_decay_iters=20)
fi
cd "$(dirname "$0")/.."
if [ $preset = gpt2_gpu ] && ! $python -c 'import torch; assert torch.cuda.is_available()'; then
    echo 'error: torch finds no CUDA GPU; see the top of this script for how to try it on a CPU'
    exit 1
fi 2> /dev/null
if [ ! -f data/shakespeare_char/train.bin ]; then
    echo 'error: data is missing: run python data/shakespeare_char/prepare.py first'
    exit 1
fi
mkdir -p "$folder"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=offline
export TORCHINDUCTOR_CACHE_DIR="$folder/inductor"  # a model is compiled once for several parts
rm -rf "$folder"/*.log "$folder"/run-* "$folder"/{parts.tsv,summary.txt,results.json}
SECONDS=0
LIMIT=535  # seconds for all parts

wants() { [[ " $parts " == *" $1 "* ]]; }

part() {  # the part's name, its limit in seconds, and the command
    local name=$1 limit=$2 start=$SECONDS status text
    shift 2
    if ((limit > LIMIT - SECONDS)); then limit=$((LIMIT - SECONDS)); fi
    status='no time left'
    if ((limit > 5)); then
        timeout -k 3 "$limit" "$@" > "$folder/$name.log" 2>&1
        status=$?
    fi
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" $((SECONDS - start)) "$*" >> "$folder/parts.tsv"
    text=$(tail -1 "$folder/$name.log" 2> /dev/null | cut -c1-150)
    echo "$name: status $status, $((SECONDS - start)) s: $text" | tee -a "$folder/summary.txt"
}

# the kernels of the speed tests are compiled while the tests run, which aren't timed
warm_up() {  # the batch sizes, and the command
    local batch_sizes=$1
    shift
    for batch_size in $batch_sizes; do
        "$@" --batch_size="$batch_size"
    done > /dev/null 2>&1
}
bench="$python bench.py --real_data=False"
plain="$python recipes/peers/plain.py train --preset=$preset --iters=20"
jobs=()
if wants tests && wants bench && [ $preset = gpt2_gpu ]; then
    # in opposite orders: two large batches may not fit at once
    warm_up "12 32 64" $bench "${flags[@]}" --repeats=3 & jobs+=($!)
    warm_up "64 32 12" $plain & jobs+=($!)
fi
if wants tests; then part tests 190 $tests; fi
for job in "${jobs[@]}"; do  # what isn't compiled by now will be when it is measured
    while kill -0 "$job" 2> /dev/null && ((SECONDS < 200)); do sleep 1; done
    kill "$job" $(pgrep -P "$job") 2> /dev/null
done
wait

if wants bench; then
    for batch_size in 12 32; do
        part "bench-$batch_size" 80 $bench "${flags[@]}" --batch_size="$batch_size" --repeats=5 \
            --compare="$plain --batch_size=$batch_size --turns=True"
    done
    # one after the other, as both may not fit at once
    part plain-64 60 $plain --batch_size=64
    part bench-64 60 $bench "${flags[@]}" --batch_size=64 --repeats=5
fi
if wants decode; then
    for num_samples in 1 10; do
        part "decode-$num_samples" 40 $bench "${flags[@]}" --what=decode --bias=True \
            --num_samples="$num_samples" --repeats=5
    done
fi
char=(config/train_shakespeare_char.py "${flags[@]}" --log_interval=100 "${iters[0]}"
      --out_dir="$folder/run-char" --init_from=scratch)
quick=(config/train_shakespeare_char_quick.py "${flags[@]}")
# the quick recipe with the size, the context and the batch of train_shakespeare_char.py
large=(--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --dropout=0.2
       --eval_interval=100 "${iters[@]:1}")
if wants char; then
    part char 130 "$python" train.py "${char[@]}"
    part sample 30 "$python" sample.py --out_dir="$folder/run-char" --num_samples=1 \
        --max_new_tokens=300 --device="${DEVICE:-cuda}"
fi
if wants quick; then
    part quick 60 "$python" train.py "${quick[@]}" --out_dir="$folder/run-quick"
    if [ $preset = cpu_recipe ]; then large=("${iters[@]:1}"); fi
    part quick-large 80 "$python" train.py "${quick[@]}" "${large[@]}" \
        --out_dir="$folder/run-quick-large"
fi
if wants profile; then
    part profile 50 $bench "${flags[@]}" --batch_size=32 --repeats=3 --profile=True \
        --out_dir="$folder/profile"
fi

"$python" - "$folder" "$SECONDS" << 'END' | tee -a "$folder/summary.txt"
# results.json: the machine, and of each part its status, seconds, and figures
import contextlib, datetime, json, os, platform, sys, traceback
sys.path.insert(0, '.')
import torch
from plot import locate, read_metrics
folder, seconds = sys.argv[1], int(sys.argv[2])
results = dict(date=datetime.date.today().isoformat(), python=platform.python_version(),
               torch=torch.__version__, cuda=torch.version.cuda, seconds=seconds, parts={})
if torch.cuda.is_available():
    results['device'] = torch.cuda.get_device_name()


def read_log(name):
    """The JSON in the last line of a part's log."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        with open(os.path.join(folder, f'{name}.log')) as f:
            return json.loads(f.read().splitlines()[-1])
    return {}


def read_run(name):
    """What a training run needed and reached. Its first iteration compiles, so it counts apart."""
    if not os.path.isdir(os.path.join(folder, f'run-{name}')):
        return {}
    iterations, evaluations = read_metrics(os.path.join(folder, f'run-{name}'))
    losses = [event['val/loss'] for event in evaluations]
    first_seconds = iterations[0]['ms'] / 1000
    seconds = float(locate(evaluations, iterations, 'seconds')[-1])
    return dict(iterations=evaluations[-1]['iter'], val_loss=losses[-1], best_val_loss=min(losses),
                first_iteration_seconds=first_seconds, training_seconds=seconds - first_seconds)


for line in open(os.path.join(folder, 'parts.tsv')):
    name, status, part_seconds, command = line.rstrip('\n').split('\t')
    part = dict(status=status, seconds=int(part_seconds), command=command, figures={})
    results['parts'][name] = part
    try:
        figures = part['figures'] = {**read_log(name), **read_run(name)}
        if name == 'bench-64' and figures:
            plain = results['parts']['plain-64']['figures']
            figures['ratio'] = figures['tokens_per_s'] / plain['tokens_per_s']
    except Exception:  # of a part that was cut off
        traceback.print_exc()
    texts = [f'{key} {part["figures"][key]:,.5g}' for key in (
        'tokens_per_s', 'ratio', 'share_of_matmul_rate', 'share_of_read_rate', 'training_seconds',
        'val_loss', 'best_val_loss') if part['figures'].get(key)]
    if texts:
        print(f'{name}:', ', '.join(texts))
with open(os.path.join(folder, 'results.json'), 'w') as f:
    json.dump(results, f, indent=1)
END
echo "all in all $SECONDS s; the figures are in $folder/results.json" | tee -a "$folder/summary.txt"
