#!/usr/bin/env bash
# Everything that needs a GPU, in the order of importance. Each stage is meant to take less than ten minutes on one H100.
#
#   bash results/gpu.sh right                     the same text and losses as on the CPU, then the tests
#   bash results/gpu.sh fast                      samples a second at full size, a profile, the structure of the authors' code
#   bash results/gpu.sh more                      the other regimes and batches, and the recipe for small cards
#   bash results/gpu.sh evidence SMOLLM2 WIKI     twelve rows of a comparison with SmolLM2-135M; call it again to continue
#
# A stage appends to $OUT/STAGE.txt as it goes (OUT is gpu_logs if it is not set), and the logs of its runs to STAGE.jsonl.
# A step that fails or takes too long is noted there and stops nothing else. SMOLLM2: a folder with SmolLM2-135M, or
# HuggingFaceTB/SmolLM2-135M. WIKI: a corpus made by
#   python data.py finewiki --model SMOLLM2 --out WIKI --context 1000 --continuation 1000 --train_segments 6400 --val_segments 300
set -u
stage=${1:?right, fast, more or evidence}; shift
out=${OUT:-gpu_logs}; work=${WORK:-/tmp/readback_gpu}; device=${DEVICE:-cuda}; mkdir -p "$out" "$work"
log=$out/$stage.txt
export PYTHONUNBUFFERED=1 TQDM_DISABLE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
trap 'tail -c 11000 "$log"' EXIT

step() {                       # seconds, command
  local limit=$1 start=$SECONDS; shift
  echo "\$ $*" >> "$log"
  timeout -k 15 "$limit" "$@" >> "$log" 2>&1
  echo "(exit code $?, $((SECONDS - start)) s)" >> "$log"
}
keep() { sed "s/^{/{\"run\": \"$1\", /" "$work/$1/log.jsonl" >> "$out/$stage.jsonl"; }     # the log of a run

right() {
  step 20 nvidia-smi
  echo 'The same page, read by the CPU and by the GPU.' > "$work/note.txt"
  step 60 python3 render.py "$work/note.txt" --size 256 --out "$work/page.png"
  step 90 env CUDA_VISIBLE_DEVICES= python3 examples/read_page.py "$work/page.png" --model results/reader     # on the CPU
  step 90 python3 examples/read_page.py "$work/page.png" --model results/reader
  # The same first weights on both: each device draws its own random numbers.
  step 60 python3 -c "
from load_deepseek import load, released_tensors, save
model, _, config = load('tiny', 'meanpool', 128)
save(released_tensors(model, 'meanpool'), config, '$work/initial')"
  for d in cpu "$device"; do
    step 120 python3 train.py --model "$work/initial" --context 128 --continuation 128 --device "$d" --steps 100 --log_steps 1 \
      --no-compile --learning_rate 3e-3 --beta2 0.95 --gradient_accumulation_steps 1 --eval_steps 0 --output_dir "$work/$d"
    keep "$d"
  done
  step 240 python3 -m pytest -q tests/test_cuda.py
  step 200 env CUDA_VISIBLE_DEVICES= python3 -m pytest -q -n 8
}

bench() {                      # name, flags: ten steps at full size, 1000 + 1000 tokens, 48 segments a step
  local name=$1; shift
  step 170 python3 train.py --model full --data "$work/corpus" --device "$device" --steps 10 --log_steps 5 --eval_steps 0 \
    --output_dir "$work/$name" "$@"
  keep "$name"                 # tokens_per_s / 1000 is samples a second; gib is the peak of the memory
}

corpus() {                     # the full preset takes bytes as tokens: for speed, any ids are as good
  [ -d "$work/corpus" ] && return
  python3 -c "
import random
from pathlib import Path
words = [''.join(random.choices('abcdefghijklmnopqrstuvwxyz', k=random.randint(2, 9))) for _ in range(5000)]
Path('$work/texts').mkdir(exist_ok=True)
for i in range(200):
    Path('$work/texts', f'{i}.txt').write_text(' '.join(random.choices(words, k=8000)))"
  step 60 python3 data.py "$work/texts" --out "$work/corpus" --train_segments 2000 --val_segments 16
}

fast() {
  corpus
  bench meanpool_8
  step 120 python3 -c "
import torch
from data import Batches
from load_deepseek import load
from train import flags, make_optimizer, train_step
device = torch.device('$device')
model, tokenizer, _ = load('full', 'meanpool', 1000, device=device)
optimizer, batches = make_optimizer(model, 1e-4, flags().parse_args([])), Batches('$work/corpus', 'train', 8, tokenizer)
forward = torch.compile(model, dynamic=False)
step = lambda: train_step(forward, optimizer, [batches[i] for i in range(6)], 1.0, 1.0, device)
step(), step()
with torch.profiler.profile() as profile:
    print(step())
print(profile.key_averages().table(sort_by='self_device_time_total', row_limit=15, max_name_column_width=80))"
  step 120 python3 tests/benchmark_step.py "$device"
  bench meanpool_24_bf16 --weights bf16 --batch_size 24 --gradient_accumulation_steps 2
  bench meanpool_8_plain --no-compile
}

more() {
  corpus
  bench conv125 --regime conv1d_residual --compression_target 125
  bench vision_small_4 --regime vision --vision_mode small --batch_size 4 --gradient_accumulation_steps 12 --no-compile
  bench text_6 --regime text --batch_size 6 --gradient_accumulation_steps 8
  bench small_card --weights bf16 --low_memory --batch_size 1 --gradient_accumulation_steps 48 --steps 5
  bench vision_small_4_compiled --regime vision --vision_mode small --batch_size 4 --gradient_accumulation_steps 12
  # With 80 GB a micro-batch has 8 segments: 16 are estimated to take 88 GB, 24 take 104.
  [ "$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1)" -gt 100000 ] || return
  for b in 16 24; do bench meanpool_$b --batch_size $b --gradient_accumulation_steps $((48 / b)); done
}

row() {                        # name, model, flags: reconstruction, or language modelling from it; nothing if it is done
  local name=$1 model=$2; shift 2
  [ -e "$work/$name/done" ] && return
  rm -rf "${work:?}/$name"
  timeout -k 15 300 python3 train.py --model "$model" --data "$wiki" --device "$device" --steps "${STEPS:-400}" --batch_size 16 \
    --gradient_accumulation_steps 1 --learning_rate 3e-4 --eval_steps 200 --no-compile --output_dir "$work/$name" "$@" \
    > "$work/$name.txt" 2>&1 && touch "$work/$name/done"
  { echo "\$ row $name $model $*"; tail -n 12 "$work/$name.txt"; } >> "$log"
  keep "$name"
}

evidence() {                   # three rows at a time
  smollm2=$1; wiki=$2
  row none "$smollm2" --regime text --text_context_tokens 0 &
  row meanpool4 "$smollm2" --regime meanpool --compression_window_size 4 &
  row conv250 "$smollm2" --regime conv1d_residual --conv_gain 0 --compression_target 250 & wait
  for n in 0 1000 252; do row lm_text$n "$work/none" --objective lm --text_context_tokens $n & done; wait
  for name in meanpool4 conv250; do row lm_$name "$work/$name" --objective lm & done
  row lm_text65 "$work/none" --objective lm --text_context_tokens 65 & wait
  row meanpool16 "$smollm2" --regime meanpool --compression_window_size 16 &
  row conv63 "$smollm2" --regime conv1d_residual --conv_gain 0 --compression_target 63 & wait
  for name in meanpool16 conv63; do row lm_$name "$work/$name" --objective lm & done; wait
}

"$stage" "$@"
