"""What the forkserver loads once: libraries that take seconds to import and start no threads by that."""

import transformers.models.encodec.modeling_encodec
import transformers.models.musicgen.modeling_musicgen
import transformers.models.t5.modeling_t5  # noqa: F401

import trainer.engine
import trainer.exports.export  # noqa: F401
