#!/usr/bin/env bash
# Everything that needs a GPU, in the order of importance.
#
#   bash results/gpu.sh right                     the same text and losses as on the CPU, then the tests
#   bash results/gpu.sh fast                      samples a second at full size, a profile, the structure of the authors' code
#   bash results/gpu.sh more                      the other regimes and batches, and the recipe for small cards
#   bash results/gpu.sh evidence SMOLLM2 WIKI     thirteen rows of a comparison with SmolLM2-135M; call it again to continue
#   bash results/gpu.sh bench NAME [FLAGS]        one measurement of `fast` or `more`, with these flags of train.py
#
# A stage appends to $OUT/STAGE.txt as it goes (OUT is gpu_logs if it is not set), and the logs of its runs to STAGE.jsonl.
# A step that fails or takes too long is noted there and stops nothing else. The time limits leave room for a first compilation,
# of which Python's part alone takes minutes where cores are busy. SMOLLM2: a folder with SmolLM2-135M, or
# HuggingFaceTB/SmolLM2-135M. WIKI: a corpus made by
#   python data.py finewiki --model SMOLLM2 --out WIKI --context 1000 --continuation 1000 --train_segments 6400 --val_segments 300
#
# To try all this without a GPU, in some minutes (evidence: with tiny as SMOLLM2 and a corpus of bytes, CONTEXT=64 STEPS=2):
#   DEVICE=cpu MODEL=tiny CONTEXT=128 BENCH_STEPS=2 TESTS=tests/test_goldens.py bash results/gpu.sh right
set -u
stage=${1:?right, fast, more, evidence or bench}; shift
out=${OUT:-gpu_logs}; work=${WORK:-/tmp/readback_gpu}; device=${DEVICE:-cuda}; mkdir -p "$out" "$work"
model=${MODEL:-full}; context=${CONTEXT:-1000}; corpus=$work/corpus_$context
log=$out/$stage.txt
# Segments of memory that can grow: without them, fragments may cost the last GB of an 80 GB card.
export PYTHONUNBUFFERED=1 PYTORCH_ALLOC_CONF=expandable_segments:True
trap 'tail -c 11000 "$log"' EXIT

step() {                       # seconds, command
  local limit=$1 start=$SECONDS; shift
  echo "\$ $*" >> "$log"
  timeout -k 15 "$limit" "$@" >> "$log" 2>&1
  echo "(exit code $?, $((SECONDS - start)) s)" >> "$log"
}
keep() { sed "s/^{/{\"run\": \"$1\", /" "$work/$1/log.jsonl" >> "$out/$stage.jsonl"; }     # the log of a run
gigabytes() { nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2> /dev/null | awk 'NR == 1 {print int($1 / 1000)} END {if (!NR) print 0}'; }

short_run() {                  # name, flags: a hundred steps of the tiny model, whose losses should not depend on the machine
  local name=$1; shift
  step 180 python3 train.py --model "$work/initial" --context 128 --continuation 128 --steps 100 --log_steps 1 --learning_rate 3e-3 \
    --beta2 0.95 --gradient_accumulation_steps 1 --eval_steps 0 --output_dir "$work/$name" "$@"
  keep "$name"
}

right() {
  step 20 nvidia-smi
  echo 'The same page, read by the CPU and by the GPU.' > "$work/note.txt"
  step 60 python3 render.py "$work/note.txt" --size 256 --out "$work/page.png"
  for d in cpu "$device"; do
    step 90 python3 examples/read_page.py "$work/page.png" --model results/reader --device "$d"
  done
  # The same first weights on both: each device draws its own random numbers.
  step 60 python3 -c "
from load_deepseek import load, released_tensors, save
model, _, config = load('tiny', 'meanpool', 128)
save(released_tensors(model, 'meanpool'), config, '$work/initial')"
  short_run on_the_cpu --device cpu
  short_run plain --device "$device" --no-compile
  [ "$device" = cpu ] || short_run compiled --device "$device"
  step 20 python3 -c "
import json
from pathlib import Path
losses = {}
for name in ('on_the_cpu', 'plain', 'compiled'):
    path = Path('$work', name, 'log.jsonl')
    if path.exists():
        losses[name] = [json.loads(line)['loss'] for line in path.read_text().splitlines()]
        gaps = [abs(a - b) for a, b in zip(losses[name], losses['on_the_cpu'])]
        print(f'{name}: loss {losses[name][-1]:.4f} at step {len(gaps)}, at most {max(gaps):.4f} from the CPU\'s')"
  step 300 python3 -m pytest -q tests/test_cuda.py
  step 200 env CUDA_VISIBLE_DEVICES= python3 -m pytest -q -n 8 ${TESTS:-}
}

bench() {                      # name, flags: ten steps at full size, 1000 + 1000 tokens, 48 segments a step; LIMIT: seconds
  local name=$1; shift
  make_corpus
  step "${LIMIT:-420}" python3 train.py --model "$model" --data "$corpus" --context "$context" --continuation "$context" --device "$device" \
    --steps "${BENCH_STEPS:-10}" --log_steps 5 --eval_steps 0 --gradient_accumulation_steps 6 --output_dir "$work/$name" "$@"
  keep "$name"                 # tokens_per_s / 1000 is samples a second; gib is the peak of the memory
}

make_corpus() {                # the full preset takes bytes as tokens: for speed, any ids are as good
  [ -d "$corpus" ] && return
  python3 -c "
import random
from pathlib import Path
words = [''.join(random.choices('abcdefghijklmnopqrstuvwxyz', k=random.randint(2, 9))) for _ in range(5000)]
Path('$work/texts').mkdir(exist_ok=True)
for i in range(200):
    Path('$work/texts', f'{i}.txt').write_text(' '.join(random.choices(words, k=8000)))"
  step 60 python3 data.py "$work/texts" --out "$corpus" --context "$context" --continuation "$context" --train_segments 2000 --val_segments 16
}

fast() {
  bench meanpool_8
  # The fourth step, the operators that take longest first.
  step 300 python3 -c "
import time, torch, torch._functorch.config
from data import Batches
from load_deepseek import load
from train import make_optimizer, parse_args, train_step
torch._functorch.config.backward_pass_autocast = 'off'       # as train.py sets it
device = torch.device('$device')
model, tokenizer, _ = load('$model', 'meanpool', $context, device=device)
optimizer, batches = make_optimizer(model, 1e-4, parse_args(['--model', 'full'])), Batches('$corpus', 'train', 8, tokenizer)
forward = torch.compile(model, dynamic=False) if device.type == 'cuda' else model
def step():
    start = time.time()
    report = train_step(forward, optimizer, [batches[i] for i in range(6)], 1.0, 1.0, device)
    print({name: x.item() for name, x in report.items()}, f'{time.time() - start:.2f} s', flush=True)
for _ in range(3):
    step()
with torch.profiler.profile() as profile:
    step()
by = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=80))"
  step 300 python3 tests/benchmark_step.py "$device"
  bench meanpool_24_bf16 --weights bf16 --batch_size 24 --gradient_accumulation_steps 2
  bench meanpool_8_plain --no-compile
}

more() {
  bench conv125 --regime conv1d_residual --compression_target $((context / 8))
  bench vision_small_4 --regime vision --vision_mode small --batch_size 4 --gradient_accumulation_steps 12 --no-compile
  bench text_6 --regime text --batch_size 6 --gradient_accumulation_steps 8
  bench small_card --weights bf16 --low_memory --batch_size 1 --gradient_accumulation_steps 48 --steps 5
  LIMIT=600 bench vision_small_4_compiled --regime vision --vision_mode small --batch_size 4 --gradient_accumulation_steps 12
  # 16 segments of mean pooling are borderline on 80 GB, 24 need more.
  [ "$(gigabytes)" -lt 75 ] || bench meanpool_16 --batch_size 16 --gradient_accumulation_steps 3
  [ "$(gigabytes)" -lt 115 ] || bench meanpool_24 --batch_size 24 --gradient_accumulation_steps 2
}

row() {                        # name, model, flags: reconstruction, or language modelling from it; nothing if it is done
  local name=$1 model=$2; shift 2
  [ -e "$work/$name/done" ] && return
  rm -rf "${work:?}/$name"
  timeout -k 15 300 python3 train.py --model "$model" --data "$wiki" --context "$context" --continuation "$context" --device "$device" \
    --steps "${STEPS:-400}" --batch_size 16 --gradient_accumulation_steps 1 --learning_rate 3e-4 --eval_steps 200 --no-compile \
    --output_dir "$work/$name" "$@" > "$work/$name.txt" 2>&1 && touch "$work/$name/done"
  { echo "\$ row $name $model $*"; tail -n 12 "$work/$name.txt"; } >> "$log"
  keep "$name"
}

evidence() {                   # three rows at a time
  smollm2=$1; wiki=$2
  local quarter=$((context / 4)) sixteenth=$(((context + 15) / 16))
  row none "$smollm2" --regime text --text_context_tokens 0 &
  row meanpool4 "$smollm2" --regime meanpool --compression_window_size 4 &
  row conv250 "$smollm2" --regime conv1d_residual --conv_gain 0 --compression_target $quarter & wait
  for n in 0 $context $((quarter + 2)); do row lm_text$n "$work/none" --objective lm --text_context_tokens $n & done; wait
  for name in meanpool4 conv250; do row lm_$name "$work/$name" --objective lm & done
  row lm_text$((sixteenth + 2)) "$work/none" --objective lm --text_context_tokens $((sixteenth + 2)) & wait
  row meanpool16 "$smollm2" --regime meanpool --compression_window_size 16 &
  row conv63 "$smollm2" --regime conv1d_residual --conv_gain 0 --compression_target $sixteenth & wait
  for name in meanpool16 conv63; do row lm_$name "$work/$name" --objective lm & done; wait
}

"$stage" "$@"
