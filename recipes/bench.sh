#!/usr/bin/env bash
# Measures all rows of the speed tables, and writes them into README.md, docs/speed.md and
# assets/speed.png. It takes half an hour on 2 cores and needs Linux. Run nothing else meanwhile.
#
#     pip install transformers==5.24.0 ctranslate2==4.8.5 llama-cpp-python==0.3.36 gguf==0.19.0
#     bash recipes/bench.sh FOLDER "2 cores of an AMD EPYC (Zen 5)"
#
# FOLDER (out-bench) is where a table and a line of JSON are written for each row. The second
# argument is what the tables call the CPU; without it the tables stay as they are. PEERS (python)
# is the Python that has the packages above: PEERS=../peers/bin/python bash recipes/bench.sh ...
set -euo pipefail
folder=$(realpath -m "${1:-out-bench}")
cpu=${2:-}
peers=${PEERS:-python}
if [ -x "$peers" ]; then
    peers=$(realpath -s "$peers")
fi
cd "$(dirname "$0")/.."
mkdir -p "$folder"

plain() {  # prints the command that runs plain PyTorch with these arguments
    echo "python recipes/peers/plain.py $*"
}

peer() {  # prints the command that runs another engine, which stays and takes turns
    echo "$peers recipes/peers/$* --turns=True"
}

row() {  # the row's name; what to compare with, or nothing; the arguments of bench.py
    name=$1
    compare=$2
    shift 2
    echo "$name: python bench.py $*"
    rm -f "$folder/$name.json"
    if ! python bench.py "$@" --compare="$compare" > "$folder/$name.txt"; then
        echo "failed, see $folder/$name.txt: the tables will not have this row"
        return
    fi
    tail -1 "$folder/$name.txt" > "$folder/$name.json"
    grep -E '^(ms, |times as fast|share)' "$folder/$name.txt"
}

char=config/train_shakespeare_char.py
cpu_recipe=config/train_shakespeare_char_cpu.py
gpt2=--real_data=False  # bench.py's defaults are GPT-2 124M; random tokens need no dataset

# it stays, because starting it for each pair would take longer than measuring
plain_cpu=$(plain train --preset=cpu_recipe --iters=60 --turns=True)
row train_cpu_recipe "$plain_cpu" $cpu_recipe
row train_cpu_recipe_compiled "$plain_cpu" $cpu_recipe --compile=True
row train_char "$(plain train --preset=char --iters=1)" $char --repeats=5
row train_char_without_dropout "" $char --dropout=0.0
row train_gpt2 "$(plain train --preset=gpt2 --iters=1)" $gpt2 --batch_size=4 --bias=True --repeats=5
row run_cpu_recipe "$(plain learn --data=data/shakespeare_char)" --what=run $cpu_recipe --repeats=3
row prefill "$(peer hf.py --what=prefill)" --what=prefill $gpt2
row decode_1 "$(peer hf.py)" --what=decode $gpt2
row decode_1_int8 "$(peer ct2.py)" --what=decode $gpt2 --weights=int8
row decode_1_int8_llama "$(peer llamacpp.py)" --what=decode $gpt2 --weights=int8
row decode_1_int4 "$(peer llamacpp.py --outtype=q4_0)" --what=decode $gpt2 --weights=int4
row decode_10 "$(peer ct2.py --num_samples=10)" --what=decode $gpt2 --num_samples=10
row decode_10_llama "$(peer llamacpp.py --num_samples=10)" --what=decode $gpt2 --num_samples=10
row decode_10_hf "$(peer hf.py --num_samples=10)" --what=decode $gpt2 --num_samples=10
long='--num_samples=10 --max_new_tokens=500'
row sample_defaults "$(peer hf.py $long)" --what=decode $gpt2 $long --repeats=3
row get_batch slices --what=data $char
row start "" --what=start $cpu_recipe
if [ -n "$cpu" ]; then
    python recipes/speed_table.py --folder="$folder" --cpu="$cpu"
fi
