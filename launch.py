"""Fine-tune MusicGen on a folder of .wav and .txt files: what every process of a run does, in order.

python launch.py --dataset DIR
accelerate launch launch.py --dataset DIR --model_id medium
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from trainer.config import Config, parse
from trainer.errors import EXIT_DONE, EXIT_RESUME, EXIT_STORAGE, TrainerError
from trainer.stopping import interruptible

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # full, over quota, read-only


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    try:
        with interruptible():
            config, typed = parse(argv)
            return run(config, typed)
    except KeyboardInterrupt:
        print("stopped: what was encoded or saved is kept; run the same command to continue", file=sys.stderr)
        return EXIT_RESUME
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        print(f"error: {error}. Complete checkpoints stay valid: make room, run the same command", file=sys.stderr)
        return EXIT_STORAGE


def run(config: Config, typed: frozenset[str]) -> int:
    """Data, then training, then files that load elsewhere."""
    # Imported here, so that --help and refused flags need no torch.
    from trainer import dataset, export, manifest, recipe
    from trainer.checkpoint import Saver
    from trainer.engine import Engine, build_accelerator, find_cluster, start_trackers
    from trainer.loop import train
    from trainer.model_card import model_card
    from trainer.models import load_language_model, open_model, quiet
    from trainer.run_folder import check_same_run, open_run
    from trainer.stopping import StopRequest
    from trainer.tracking import Tracker

    quiet()
    folder, checkpoint = open_run(config.output_dir, config.resume)
    plan = recipe.plan_of(config, typed, find_cluster(), checkpoint)
    print(plan.describe())
    source = open_model(config.model_id)
    accelerator = build_accelerator(plan, config, folder.root)

    data = dataset.prepare(config, source, accelerator.device)
    print(manifest.summary(data.fates))
    manifest.write_report(data.fates, folder.report)

    identity = recipe.identity_of(config, source, data)
    order = recipe.order_of(config, plan, data)
    start_step = 0
    if checkpoint is not None:
        check_same_run(checkpoint, identity)
        start_step = checkpoint.step
        if start_step >= order.steps and folder.finished_step() == start_step:
            print(f"already complete: {start_step} steps, results in {folder.root} (--epochs adds to them)")
            return EXIT_DONE
        print(f"resuming from {checkpoint.folder}, step {start_step} of {order.steps}")
    folder.write_json("config.json", config.to_dict())
    folder.write_json("plan.json", plan.to_dict())

    model = load_language_model(source, dropout=config.dropout)
    engine = Engine(accelerator, model, plan, config)
    if checkpoint is not None:
        engine.load(checkpoint)
    saver = Saver(folder.checkpoints)
    tracker = Tracker(folder.metrics, start_step=start_step, external=start_trackers(accelerator, config, folder))
    training = recipe.run_of(config, plan, order, data, identity, folder)
    with StopRequest() as stop:
        step = train(training, engine, saver, tracker, stop, start_step)
    tracker.close()

    if step < order.steps:
        print(f"{stop.name}: saved after step {step} of {order.steps}; run the same command to continue")
        return EXIT_RESUME
    print("exporting ...")
    export.export_all(
        source,
        saver.last().weights(),
        folder.root,
        card=model_card(recipe.training_of(config, plan, order, data, step)),
        segment_seconds=config.segment_seconds,
        cfg_dropout=config.caption_drop_rate,
    )
    folder.write_json("finished.json", {"step": step})
    print(f"done: {step} steps. {folder.root}/lm_final.pt, huggingface/, audiocraft/ are ready; listen with")
    print(f'  python scripts/generate.py --model {folder.root}/huggingface --prompt "..." --seconds 10')
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
