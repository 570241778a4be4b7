"""Fine-tune MusicGen on a folder of .wav and .txt files: what every process of a run does, in order.

python launch.py --dataset DIR
accelerate launch --num_processes 8 launch.py --dataset DIR --model_id large
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DISK_ERRORS, EXIT_DONE, EXIT_RESUME, EXIT_STORAGE, TrainerError
from trainer.flags.config import Config, parse
from trainer.run.signals import interruptible, time_limit

if TYPE_CHECKING:
    from trainer.plan.launcher import Launch
    from trainer.run.exit_code import Ending


def main(argv: Sequence[str]) -> int:
    """Run the program; returns its exit code (see trainer/errors.py)."""
    started = time.monotonic()
    try:
        with interruptible():
            config, typed = parse(argv)
            if config.dry_run:
                from trainer.plan.dry_run import dry_run

                return dry_run(config, typed)
            with time_limit(config.max_minutes, since=started):
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
    """Hold output_dir for this run, and leave the exit code there."""
    from trainer.plan.launcher import read_launch
    from trainer.run.exit_code import Ending

    launch = read_launch(os.environ)
    if launch.use_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch, DeepSpeed and Accelerate each look for GPUs
    with Ending(config.output_dir, first=launch.rank == 0) as ending:
        ending.code = train_and_export(config, typed, launch, ending)
    return ending.code


def train_and_export(config: Config, typed: frozenset[str], launch: Launch, ending: Ending) -> int:
    """Plan, data, training, files that load elsewhere; on every process alike."""
    # Imported here, so that --help, --dry_run and refused flags need no torch.
    from trainer import wiring
    from trainer.data import dataset, manifest
    from trainer.engine import Engine, Ranks, build_accelerator, find_cluster, start_trackers
    from trainer.exports import export
    from trainer.exports.init_from import find_starting_point, start_from
    from trainer.model.new_word import embedding_of, introduction
    from trainer.model.source import open_model, quiet
    from trainer.run.checkpoint import Saver
    from trainer.run.metrics import Tracker
    from trainer.run.output_dir import check_same_run, open_run
    from trainer.run.signals import StopRequest
    from trainer.training.loop import train, worst_case

    quiet()
    folder, checkpoint = open_run(config.output_dir, config.resume, first=launch.rank == 0)
    source = open_model(config.model_id)
    start = None
    # A run that goes on has its trained weights in its checkpoint, and what is frozen in none.
    if config.init_from is not None and (checkpoint is None or not config.selection.everything):
        start = find_starting_point(config.init_from)
        source = start_from(source, start)
    word = introduction(config, source)
    cluster = find_cluster(launch, compiler=config.compile != "0")
    plan = wiring.plan_of(config, typed, cluster, launch, source, checkpoint)
    accelerator = build_accelerator(plan, config, folder.root)
    with Ranks(timeout_seconds=60 * config.timeout_minutes, record=ending.record) as ranks:
        start_step = 0 if checkpoint is None else checkpoint.step
        ranks.check_equal(flags=config.to_dict(), plan=plan.to_dict(), checkpoint=start_step)
        ranks.check_shared(output_dir=folder.root, cache_dir=Path(config.cache_dir))
        ranks.say(plan.describe())
        if word is not None:
            ranks.say(word)

        data = dataset.prepare(config, source, accelerator.device, ranks)
        ranks.say(manifest.summary(data.fates))
        identity = wiring.identity_of(config, source, data)
        ranks.check_equal(**{"what the run is made of": identity})
        order = wiring.order_of(config, plan, data)
        if checkpoint is not None:
            check_same_run(checkpoint, identity)
            if start_step >= order.steps and folder.finished_step() == start_step:
                ranks.say(f"already complete: {start_step} steps, results in {folder.root} (--epochs adds to them)")
                return EXIT_DONE
            ranks.say(f"resuming from {checkpoint.folder}, step {start_step} of {order.steps}")
        elif start is not None:
            ranks.say(f"starting from the weights in {start.path}")
        if words := wiring.words_on_average(config, order):
            ranks.say(words)
        if ranks.is_first:
            folder.describe(config.to_dict(), plan.to_dict(), data.fates)

        engine = Engine(accelerator, ranks, source, plan, config)
        training = wiring.run_of(config, plan, order, data, identity, folder, source)
        engine.rehearse(worst_case(training), plan.accumulation)
        if checkpoint is not None:
            engine.load(checkpoint)
        saver = Saver(folder.checkpoints, rank=ranks.rank, world_size=ranks.world_size)
        reports = start_trackers(accelerator, config, folder)
        tracker = Tracker(folder.metrics if ranks.is_first else None, start_step=start_step, external=reports)
        with StopRequest() as stop:
            step = train(training, engine, saver, tracker, stop, start_step)
            tracker.close()
        if ranks.is_first and (words := folder.words_on_tracking()):
            print(words)

        if step < order.steps:
            ranks.say(f"{stop.name or 'stopped'}: saved after step {step} of {order.steps}; run the same command again")
            return EXIT_RESUME
        if ranks.is_first:
            print("exporting ...")
            told = wiring.training_of(config, plan, order, data, step)
            settings, trained = wiring.export_of(config, told), saver.last().weights()
            embedding = embedding_of(config, source, trained)
            if embedding is not None:
                export.export_text(source, embedding, folder.root, card=settings["card"])
            else:
                export.export_all(source, trained, folder.root, **settings)
            folder.write_json("finished.json", {"step": step})
            print(folder.words_at_the_end(step, config.placeholder if config.tune_text else None))
        return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
