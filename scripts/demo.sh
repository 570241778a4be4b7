#!/usr/bin/env bash
# bash scripts/demo.sh [FOLDER, default demo]
#
# The whole road in minutes on a laptop, without a network beyond pip: install, train a tiny model on the clips of
# examples/, and play them back. FOLDER gets the run, a cache and the sounds. A second call shows the result again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0
folder=${1:-demo}
run=$folder/run
sounds=$folder/sounds

# All ten clips in every step, at a rate for random weights: the default 1e-5 is for fine-tuning trained ones.
# --code_views 1: one encoding of each clip, so that there is one right answer.
training=(--dataset examples --model_id debug --code_views 1
    --epochs 160 --batch_size 2 --grad_acc 5 --lr 8e-3
    --cache_dir "$folder/cache" --output_dir "$run")

# One thread: for so small a model several mostly wait for each other, the more so on a busy machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

bash scripts/setup.sh
python=.venv/bin/python
installed=$SECONDS

if [[ -f $run/finished.json ]]; then
    echo "== $run holds a finished run: nothing is trained again (delete $folder to start anew)"
else
    echo "== Training the debug model (random weights, 2 M parameters) on ten clips of 4 to 8 seconds, in four formats"
    "$python" launch.py "${training[@]}"
fi

echo
echo "== The loss of each step"
"$python" scripts/loss_curve.py "$run"
echo
echo "== Share of each clip's codes that the model plays back from its caption, before and after the training"
"$python" scripts/recall.py --run "$run" --wav "$sounds"

cat <<EOF

What this shows: reading, captioning, encoding, training, checkpoints and export work together on this machine,
and the exported model has learned which music belongs to which caption.
What it cannot show: music. The debug model's codec is random, so that even a clip's own codes decode to noise;
its language model knows these ten clips by heart and nothing else. That takes Meta's weights, as below.

Where things are
  $run/lm_final.pt     for audiocraft: model.lm.load_state_dict(torch.load(...))
  $run/huggingface/    for transformers: MusicgenForConditionalGeneration.from_pretrained(...)
  $run/audiocraft/     for audiocraft: MusicGen.get_pretrained(...)
  $run/recall.json     the table above; metrics.jsonl: every step
  $sounds/       each clip's codes as sound: 0_true, 1_before, 2_after

The same with your music: a folder of song.wav (any length) and song.txt (its caption), and a GPU
  .venv/bin/accelerate launch launch.py --dataset MY_FOLDER --model_id small
  .venv/bin/python scripts/generate.py --model models --prompt "..." --seconds 10
small has 0.42 billion parameters at 16 bytes each (weights, gradients, optimizer): 6.7 GB of GPU memory, and
activations on top. Its weights are downloaded from the Hugging Face Hub (facebook/musicgen-small).

Done in $((SECONDS - installed)) s, after $installed s of installation.
EOF
