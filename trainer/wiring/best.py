"""From the flags to what follows from a run's validations: its judge, what is exported, and what is said of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tqdm import tqdm

from trainer.evaluation import samples
from trainer.run.best import mend_best
from trainer.run.checkpoint import Checkpoint, rotate
from trainer.run.checkpoint_folders import folder_name, is_complete
from trainer.run.standing import Standing, Validation
from trainer.training.judge import Judge

if TYPE_CHECKING:
    from trainer.data.dataset import Dataset
    from trainer.data.order import Order
    from trainer.engine import Ranks
    from trainer.flags.config import Config
    from trainer.run.output_dir import OutputDir

KEEPS_BEST = "the step of the lowest validation loss is kept besides the newest two checkpoints (--keep_best 1)"


def judge_of(
    config: Config, order: Order, data: Dataset, checkpoint: Checkpoint | None, folder: OutputDir, ranks: Ranks
) -> Judge:
    """The judge of the run that starts or goes on here, the same on every rank; says what it does not go on with."""
    then = None if checkpoint is None else checkpoint.run.validations
    now, remarks = then, list[str]()
    if checkpoint is not None and then is not None:
        # As the first process sees the disk, since a network file system may show it to another one later.
        there = then.kept is not None and is_complete(folder.checkpoints / folder_name(then.kept.step))
        now, remarks = _continued(config, order, data, then, checkpoint, is_kept=ranks.gather(there)[0])
    elif data.validation is not None:
        now = Standing(validated_on=data.validation_digest, steps=order.steps)
        if checkpoint is not None and checkpoint.step > 0 and (config.keep_best or config.early_stop):
            remarks = ["the checkpoint is from before validations were counted: they count from here"]
    for remark in remarks:
        ranks.say(remark)
    return Judge(now, keep_best=config.keep_best, early_stop=config.early_stop, say=_teller(ranks))


def _continued(
    config: Config, order: Order, data: Dataset, then: Standing, checkpoint: Checkpoint, *, is_kept: bool
) -> tuple[Standing, list[str]]:
    """The standing to go on with, and what the user should know of what is left of the former one.

    is_kept  whether the checkpoint of `then.kept` is in this output_dir
    """
    kept, remarks = then.kept, []
    where = "" if kept is None else f"step {kept.step} (validation loss {kept.loss:.4f})"
    if data.validation is not None and then.validated_on != data.validation_digest:
        remarks.append("the clips to validate on are others than before: validations count from here")
        if kept is not None and is_kept:
            remarks.append(
                f"{where}, the best on the former clips, is an ordinary checkpoint now and goes when newer ones come:"
                " copy its folder in checkpoints/ to keep it"
            )
        return Standing(validated_on=data.validation_digest, steps=order.steps), remarks
    if kept is not None and not is_kept and not (config.keep_best and kept.step == checkpoint.step):
        if config.keep_best:
            remarks.append(
                f"{where}, the best so far, is not in this output_dir: --keep_best keeps the best step from here on"
            )
        kept = None
    elif kept is not None and not config.keep_best:
        remarks.append(
            f"{where}, which --keep_best 1 kept, stays in checkpoints/ until you delete it; without that flag no better"
            " one is kept, and the last step is exported"
        )
    elif kept is None and config.keep_best and then.best is not None:
        remarks.append(
            f"step {then.best.step}, the best so far, was not kept: --keep_best keeps the best step from here on"
        )
    now = replace(then, kept=kept, steps=order.steps)
    if config.early_stop and then.without_improvement >= config.early_stop and order.steps > then.steps:
        now = replace(now, without_improvement=0)
        remarks.append(
            f"the run had ended early and has {order.steps} steps now instead of {then.steps}: validations without"
            " improvement count from here"
        )
    return now, remarks



def mend(judge: Judge, folder: OutputDir) -> None:
    """Make good, on the first process, what a kill between a best checkpoint and the removal of the former one left.

    Once the checkpoint to go on from is loaded: before that, none is removed.
    """
    mend_best(folder.best, folder.checkpoints, None if judge.standing is None else judge.standing.kept)
    rotate(folder.checkpoints, judge.standing)


def step_to_export(config: Config, standing: Standing | None, last_step: int) -> int:
    """The step whose weights are exported of a run that ends after `last_step`."""
    kept = None if standing is None else standing.kept
    return last_step if kept is None or not config.keep_best or config.export == "last" else kept.step


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run that is complete ended.

    step             the last
    exported_step    whose weights are exported
    validation_loss  of the exported step; None where it is not known
    early_stop       validations without improvement that ended the run; None where all steps were made
    steps            of the whole run, had it not ended early
    best_step        of the lowest validation loss; None where nothing validated
    """

    step: int
    exported_step: int
    validation_loss: float | None
    early_stop: int | None
    steps: int
    best_step: int | None

    def to_json(self) -> dict[str, object]:
        """The content of finished.json."""
        values: dict[str, object] = {
            "step": self.step,
            "exported_step": self.exported_step,
            "reason": "all steps" if self.early_stop is None else "early stop",
            "steps": self.steps,
        }
        if self.validation_loss is not None:
            values["validation_loss"] = self.validation_loss
        return values if self.early_stop is None else {**values, "early_stop": self.early_stop}

    def in_words(self) -> str:
        """What the closing message says of it; "" of a run that never validated."""
        sentences = []
        if self.early_stop is not None:
            sentences.append(
                f"It ended early, of {self.steps}: {self.early_stop} validation(s) were no better than step"
                f" {self.best_step} (--early_stop)."
            )
        if self.validation_loss is not None:
            best = ", the best that was kept (--export last takes the last)" * (self.exported_step != self.step)
            loss = f"validation loss {self.validation_loss:.4f}"
            sentences.append(f"Exported is step {self.exported_step}, {loss}{best}.")
        return " ".join(sentences)


def ending_of(config: Config, judge: Judge, order: Order, step: int) -> Ending:
    """How the run ended after `step` steps."""
    standing = judge.standing
    exported = step_to_export(config, standing, step)
    best = None if standing is None else standing.best
    return Ending(
        step=step,
        exported_step=exported,
        validation_loss=None if standing is None else standing.loss_at(exported),
        early_stop=config.early_stop if step < order.steps else None,
        steps=order.steps,
        best_step=None if best is None else best.step,
    )


def complete_in_words(config: Config, judge: Judge, order: Order, step: int, folder: OutputDir) -> str | None:
    """What is said of a run that is complete and exported after `step` steps; None where there is work left."""
    if step < order.steps and not judge.ends_run:
        return None
    ending = ending_of(config, judge, order, step)
    best = _exported_best_without_checkpoint(config, judge, folder)
    if best is not None:
        ending = replace(ending, exported_step=best.step, validation_loss=best.loss)
    if (folder.finished_step(), folder.exported_step()) != (step, ending.exported_step):
        return None
    if config.sample_every is not None and best is None and _lacks_samples(folder, step):
        return None
    more = "--epochs" if config.max_steps is None else "--max_steps"
    if ending.early_stop is None:
        return f"already complete: {step} steps, results in {folder.root} (a larger {more} adds to them)"
    return (
        f"already complete: {step} of {order.steps} steps, results in {folder.root}. {ending.in_words()} (a larger"
        f" --early_stop, none, or a larger {more} goes on)"
    )


def _exported_best_without_checkpoint(config: Config, judge: Judge, folder: OutputDir) -> Validation | None:
    """The best validation where its step is exported and somebody has deleted its checkpoint since then; else None.

    The export of the last step must not take its place.
    """
    standing = judge.standing
    if standing is None or standing.best is None or standing.kept is not None:
        return None
    is_exported = config.keep_best and config.export == "best" and folder.exported_step() == standing.best.step
    return standing.best if is_exported else None


def _lacks_samples(folder: OutputDir, step: int) -> bool:
    """Whether the sounds of the last step are to be made: a stop has cut them short, or they are asked for only now."""
    try:
        return not samples.is_finished(folder.samples, step)
    except OSError:  # none can be written there
        return False


def _teller(ranks: Ranks) -> Callable[[str], None]:
    """Prints a line on the first process, without cutting the progress bar."""
    return (lambda text: tqdm.write(text)) if ranks.is_first else (lambda text: None)
