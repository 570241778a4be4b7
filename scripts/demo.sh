#!/usr/bin/env bash
# bash scripts/demo.sh [FOLDER, default demo]
#
# The whole road in minutes on a laptop, without a network beyond pip: install, train a tiny model on eight clips of
# examples/, play them back, to be heard, and ask for two others, which it was not trained on. FOLDER gets the clips, the
# model, the run, a cache and the sounds. A second call shows the result again. SEED=1 before the command trains in
# another order.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SECONDS=0
folder=${1:-demo}
seed=${SEED:-0}
model=$folder/model
run=$folder/run
sounds=$folder/sounds

# Two of the ten clips are held out: what the model knows by heart of the others must be little of these. One of them is
# long enough to be continued after 5 s.
clips=$folder/clips held_out=$folder/held_out
parting=(arcade_horizon metal_chaosland)

# Two clips in each step, at a rate for random weights: the default 1e-5 is for fine-tuning trained ones.
# --code_views 1: one encoding of each clip, so that there is one right answer.
# Each caption is played before the training, in the middle of it and at its end, by the likeliest codes alone, for 4 s:
# the shortest clip is as long.
training=(--dataset "$clips" --validation "$held_out" --validation_steps 50 --model_id "$model" --code_views 1
    --epochs 150 --batch_size 2 --grad_acc 1 --lr 1.5e-3 --seed "$seed"
    --sample_every 300 --sample_prompts captions --sample_seconds 4 --sample_guidance 1 --sample_top_k 1
    --cache_dir "$folder/cache" --output_dir "$run")

# One thread: for so small a model several mostly wait for each other, the more so on a busy machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1

bash scripts/setup.sh
python=.venv/bin/python
installed=$SECONDS

if [[ ! -d $clips ]]; then
    rm -rf "$clips.partial" "$held_out"
    mkdir -p "$clips.partial" "$held_out"
    cp examples/*.{wav,flac,mp3,ogg,txt,csv,json} "$clips.partial"
    for name in "${parting[@]}"; do mv "$clips.partial/$name".* "$held_out"; done
    mv "$clips.partial" "$clips"
fi
if [[ ! -d $model ]]; then
    echo "== Making a model of random weights, whose codec knows the sound of these ten clips"
    "$python" scripts/demo_model.py --dataset examples --output "$model"
    echo
fi
if [[ -f $run/finished.json ]]; then
    echo "== $run holds a finished run: nothing is trained again (delete $folder to start anew)"
else
    echo "== Training it (2 M parameters) on eight clips of 4 to 8 seconds; two others are held out"
    "$python" launch.py "${training[@]}"
fi

echo
echo "== The loss of each step"
"$python" scripts/loss_curve.py "$run"
echo
echo "== What the model knows by heart: of the clips that it was trained on, and of those that were held out"
"$python" scripts/recall.py --run "$run" --wav "$sounds"

cat <<EOF

Open $run/report.html in a browser and listen: each caption before and after the training, the clip itself beside
them, how the loss fell while that of the held-out clips rose, and the tables above. The same as .wav files, and each
clip to its end, in $sounds/:
  0_true (the clip), 1_before and 2_after (what the model makes of its caption)

What this shows: reading, captioning, encoding, training, checkpoints and export work together on this machine,
and the exported model has learned which music belongs to which caption, so that one hears it. Eight clips come back
code for code; of the held-out ones no more than chance: what was trained was learned, and nothing else could be.
What it does not show: new music. This model's codec is fitted to these ten clips and knows no other sound (of new
frames it takes the nearest that it knows); its language model knows the eight by heart and nothing else. For music it
takes Meta's weights, as below.

Where things are
  $run/lm_final.pt     for audiocraft: model.lm.load_state_dict(torch.load(...))
  $run/huggingface/    for transformers: MusicgenForConditionalGeneration.from_pretrained(...)
  $run/audiocraft/     for audiocraft: MusicGen.get_pretrained(...)
  $run/recall.json     the tables above; metrics.jsonl: every step
  $model/         what was trained, and its README.md

The same with your music: a folder of song.wav (any length) and song.txt (its caption), and a GPU
  .venv/bin/accelerate launch launch.py --dataset MY_FOLDER --model_id small
  .venv/bin/python scripts/generate.py --model models --prompt "..." --seconds 10
small has 0.42 billion parameters at 16 bytes each (weights, gradients, optimizer): 6.7 GB of GPU memory, and
activations on top. Its weights are downloaded from the Hugging Face Hub (facebook/musicgen-small).

Done in $((SECONDS - installed)) s, after $installed s of installation.
EOF
