#!/usr/bin/env bash
# Trains a small model with each tokenizer, exports it, and opens it in other programs: a table.
#
#     bash recipes/clients.sh [TEXT [FOLDER]]
#
# TEXT is a file to train on (the pages of docs/). FOLDER (out-clients) gets the models, virtual
# environments with the programs, their logs, and clients.json. Environments that are there are
# used again.
#
# It is for Linux and macOS with Python 3.11 to 3.13, and has been tried on Linux. It needs the
# network, 15 GB of disk, and cmake and a C++ compiler for llama.cpp. Without a compiler the table
# has no row of llama.cpp.
set -euo pipefail
text=$(realpath "${1:-/dev/null}")
folder=${2:-out-clients}
mkdir -p "$folder"
folder=$(realpath "$folder")
cd "$(dirname "$0")/.."
if [ "$text" = "$(realpath /dev/null)" ]; then
    text="$folder/docs.txt"
    cat docs/*.md > "$text"
fi
torch='torch==2.13.0 numpy==2.4.6 tiktoken==0.14.0 tqdm matplotlib'
both='peft==0.21.2 accelerate==1.15.0 ctranslate2==4.8.5 onnxruntime==1.32.0 onnx==1.23.2
      onnxscript==0.7.2'
version_4="transformers==4.57.6 lm-eval[hf]==0.4.13 mlx-lm==0.29.1 mlx[cpu]==0.32.4 gguf==0.19.0"
version_5='transformers==5.24.0'
llama=0.3.36  # the version of llama-cpp-python, whose archive has the sources of llama.cpp, too

install() {  # the environment's name, and the packages
    local name=$1
    shift
    if [ -x "$folder/$name/bin/python" ]; then return; fi
    python3 -m venv "$folder/$name"
    if ! "$folder/$name/bin/pip" install -q "$@"; then
        rm -rf "${folder:?}/$name"
        exit 1
    fi
}
install version_4 $torch $both $version_4
install version_5 $torch $both $version_5
sources="$folder/llama_cpp_python-$llama"
if [ ! -d "$sources" ]; then
    (cd "$folder" &&
     version_4/bin/pip download -q --no-deps --no-binary=:all: "llama-cpp-python==$llama" &&
     tar xzf "llama_cpp_python-$llama.tar.gz" &&
     version_4/bin/pip install -q "./llama_cpp_python-$llama") || {
        rm -rf "$sources"
        echo 'llama-cpp-python could not be built, so the table has no row of llama.cpp' >&2
    }
fi

python="$folder/version_5/bin/python"
for tokenizer in char bpe bytes gpt2; do
    data="$folder/data-$tokenizer" out="$folder/out-$tokenizer" hf="$folder/hf-$tokenizer"
    rm -rf "$data" "$out" "$hf"
    flags=
    if [ $tokenizer = bpe ]; then flags=--vocab_size=1024; fi
    "$python" data/text/prepare.py --input="$text" --tokenizer=$tokenizer --out_dir="$data" $flags
    "$python" train.py --dataset="$data" --out_dir="$out" --device=cpu --dtype=float32 \
        --n_layer=3 --n_head=4 --n_embd=96 --block_size=64 --batch_size=12 \
        --gradient_accumulation_steps=1 --learning_rate=3e-3 --max_iters=100 \
        --lr_decay_iters=100 --warmup_iters=10 --eval_interval=100 --eval_iters=10
    "$python" convert.py --out_dir="$out" --hf_dir="$hf"
done > "$folder/models.log"

# the prompt is from the text, so a table of characters has its characters
start=$("$python" -c 'import sys
text = open(sys.argv[1], encoding="utf-8").read()[:1000]
sys.stdout.buffer.write(max(text.split(), key=len)[:9].encode("utf-8"))' "$text")
rm -f "$folder/rows.jsonl"
for environment in version_4 version_5; do
    for tokenizer in char bpe bytes gpt2; do
        echo "$environment, $tokenizer" >&2
        # its status says whether all are equal, and so does the table
        "$folder/$environment/bin/python" recipes/clients.py --out_dir="$folder/out-$tokenizer" \
            --hf_dir="$folder/hf-$tokenizer" --llama_cpp="$sources/vendor/llama.cpp" \
            --start="$start" 2> "$folder/$environment-$tokenizer.log" | tail -1 || true
    done
done > "$folder/rows.jsonl"
"$python" - "$folder" << 'END'
import datetime
import json
import os
import sys

folder = sys.argv[1]
results = {}
with open(os.path.join(folder, 'rows.jsonl'), encoding='utf-8') as f:
    for line in f:
        result = json.loads(line)
        for client, version, text in result['rows']:
            if version:
                key = client, version, result['transformers']
                results.setdefault(key, {})[result['hf_dir']] = text
names = ['char', 'bpe', 'bytes', 'gpt2']
rows = [[*key, *(texts.get(f'hf-{name}', 'failed') for name in names)]
        for key, texts in sorted(results.items())]
columns = ['client', 'version', 'transformers', *names]
for row in [columns, *rows]:
    print('  '.join(text[:40].ljust(12) for text in row).rstrip())
table = dict(date=str(datetime.date.today()), python=sys.version.split()[0],
             columns=columns, rows=rows)
with open(os.path.join(folder, 'clients.json'), 'w', encoding='utf-8') as f:
    json.dump(table, f, indent=1)
    f.write('\n')
sys.exit(any(text != 'equal' for row in rows for text in row[3:]))
END
