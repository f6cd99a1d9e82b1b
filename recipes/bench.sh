#!/usr/bin/env bash
# Measures every row of the speed table in docs/speed.md, which takes about half an hour on 2 cores.
# It needs Linux and bash. Run nothing else at the same time.
#
#     bash recipes/bench.sh [FOLDER]
#
# FOLDER (out-bench) is where a table and a line of JSON are written for each row. Some rows compare
# with plain PyTorch, recipes/peers/plain.py.
set -euo pipefail
folder=$(realpath -m "${1:-out-bench}")
cd "$(dirname "$0")/.."
mkdir -p "$folder"

plain() {  # prints the command that runs plain PyTorch with these arguments
    echo "python recipes/peers/plain.py $*"
}

row() {  # the row's name; what to compare with, or nothing; the arguments of bench.py
    name=$1
    compare=$2
    shift 2
    echo "$name: python bench.py $*"
    if ! python bench.py "$@" --compare="$compare" > "$folder/$name.txt"; then
        echo "failed, see $folder/$name.txt"
        return
    fi
    tail -1 "$folder/$name.txt" > "$folder/$name.json"
    grep -E '^(ms, |times as fast|share)' "$folder/$name.txt"
}

char=config/train_shakespeare_char.py
cpu=config/train_shakespeare_char_cpu.py
gpt2=--real_data=False  # bench.py's defaults are GPT-2 124M; random tokens need no dataset

plain_cpu=$(plain train --preset=cpu_recipe --iters=60)
row train_cpu_recipe "$plain_cpu" $cpu
row train_cpu_recipe_compiled "$plain_cpu" $cpu --compile=True
row train_char "$(plain train --preset=char --iters=1)" $char --repeats=3
row train_char_without_dropout "" $char --dropout=0.0
row train_gpt2 "$(plain train --preset=gpt2 --iters=1)" $gpt2 --batch_size=4 --bias=True --repeats=3
row run_cpu_recipe "$(plain learn --data=data/shakespeare_char)" --what=run $cpu --repeats=3
row decode_1 hf --what=decode $gpt2
row decode_10 hf --what=decode $gpt2 --num_samples=10
row sample_defaults "$(plain generate --preset=gpt2 --tokens=500)" --what=decode $gpt2 \
    --num_samples=10 --max_new_tokens=500 --repeats=3
row prefill hf --what=prefill $gpt2
row get_batch slices --what=data $char
row start "" --what=start $cpu
