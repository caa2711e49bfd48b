#!/usr/bin/env bash
# Everything that needs a GPU, in the order of importance; on one H100 about half an hour. Logs go to $OUT as it goes.
#
#   OUT=gpu_logs bash results/gpu.sh right                     tests, the same numbers as on the CPU          3 minutes
#   OUT=gpu_logs bash results/gpu.sh fast                      samples a second at full size, a profile       10 minutes
#   OUT=gpu_logs bash results/gpu.sh evidence SMOLLM2 WIKI     twelve rows of the grid with SmolLM2-135M      15 minutes
#
# SMOLLM2: a folder with SmolLM2-135M (or HuggingFaceTB/SmolLM2-135M). WIKI: a corpus that was made by
#   python data.py finewiki --model SMOLLM2 --out WIKI --context 1000 --continuation 1000 --train_segments 20000
set -u
out=${OUT:-gpu_logs}; mkdir -p "$out"; work=$(mktemp -d)
log() { name=$1; shift; echo "\$ $*" | tee "$out/$name.txt"; "$@" 2>&1 | tail -40 | tee -a "$out/$name.txt"; }
losses() { cut -d, -f1-3 "$1/log.jsonl" > "$2"; }

right() {
  nvidia-smi | tee "$out/nvidia-smi.txt"
  log test_cuda python -m pytest -q tests/test_cuda.py
  log tests python -m pytest -q -n 8
  echo 'The same page, read by the CPU and by the GPU.' > "$work/note.txt"
  python render.py "$work/note.txt" --size 256 --out "$work/page.png"
  for d in cpu cuda; do log read_$d python eval.py --model results/reader --image "$work/page.png" --device $d; done
  for d in cpu cuda; do
    log default_$d python train.py --device $d --steps 100 --log_steps 1 --no-compile --output_dir "$work/$d"
    losses "$work/$d" "$out/losses_$d.txt"
  done
}

bench() {                      # name, then flags: 20 steps at full size, 1000 + 1000 tokens, 48 segments a step
  name=$1; shift
  log "bench_$name" timeout 300 python train.py --model full --data "$work/corpus" --steps 20 --log_steps 5 --save_steps 0 \
    --eval_segments 8 --output_dir "$work/$name" "$@"
  cp "$work/$name/log.jsonl" "$out/bench_$name.jsonl" 2>/dev/null   # tokens_per_s / 1000 = samples a second; gpu memory
}

fast() {
  python - "$work/texts" <<'PY'
import random, sys
from pathlib import Path
random.seed(0)
words = [''.join(random.choices('abcdefghijklmnopqrstuvwxyz', k=random.randint(2, 9))) for _ in range(5000)]
folder = Path(sys.argv[1]); folder.mkdir()
for i in range(200):
    (folder / f'{i}.txt').write_text(' '.join(random.choices(words, k=8000)))
PY
  # The full preset takes bytes as tokens: for speed any ids are as good.
  python data.py "$work/texts" --out "$work/corpus" --context 1000 --continuation 1000 --train_segments 2000
  log authors python tests/benchmark_step.py cuda
  for b in 8 16 24; do bench meanpool_$b --batch_size $b --gradient_accumulation_steps $((48 / b)); done
  bench meanpool_plain --no-compile
  bench vision_small --regime vision --vision_mode small --batch_size 16 --gradient_accumulation_steps 3
  bench vision_plain --regime vision --vision_mode small --no-compile
  bench conv125 --regime conv1d_residual --compression_target 125 --batch_size 16 --gradient_accumulation_steps 3
  bench text --regime text --batch_size 16 --gradient_accumulation_steps 3
  bench small_card --weights bf16 --optimizer adafactor --grad_checkpoint --batch_size 1 --gradient_accumulation_steps 48
  log profile python - "$work/corpus" <<'PY'
import sys, torch
sys.path.insert(0, '.')
from data import Batches
from load_deepseek import load
from train import flags, make_optimizer, train_step
device = torch.device('cuda')
model, tokenizer, _ = load('full', 'meanpool', 1000, device=device)
optimizer = make_optimizer(model, 1e-4, flags().parse_args([]))
batches = Batches(sys.argv[1], 'train', 16, tokenizer)
for _ in range(3):
    train_step(model, optimizer, [batches[0]], 1.0, 1.0, device)
with torch.profiler.profile(activities=list(torch.profiler.ProfilerActivity)) as profile:
    train_step(model, optimizer, [batches[i] for i in range(3)], 1.0, 1.0, device)
    torch.cuda.synchronize()
print(profile.key_averages().table(sort_by='self_cuda_time_total', row_limit=15, max_name_column_width=80))
PY
}

row() {                        # name, model, then flags: reconstruction, or language modelling from it
  name=$1; model=$2; shift 2
  log "row_$name" python train.py --model "$model" --data "$wiki" --steps 400 --batch_size 16 --gradient_accumulation_steps 1 \
    --learning_rate 3e-4 --eval_steps 200 --output_dir "$work/$name" "$@"
  cp "$work/$name/log.jsonl" "$out/row_$name.jsonl" 2>/dev/null
}

evidence() {
  smollm2=$1; wiki=$2
  row none "$smollm2" --regime text --text_context_tokens 0
  for n in 1000 252 65 0; do row lm_text$n "$work/none" --objective lm --text_context_tokens $n; done
  for w in 4 16; do row meanpool$w "$smollm2" --regime meanpool --compression_window_size $w; done
  for m in 250 63; do row conv$m "$smollm2" --regime conv1d_residual --compression_target $m; done
  for name in meanpool4 meanpool16 conv250 conv63; do row lm_$name "$work/$name" --objective lm; done
  log table python eval.py "$work"/none "$work"/meanpool* "$work"/conv* "$work"/lm_* --generate 0 --device cuda
}

"$@"
