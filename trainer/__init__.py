"""Fine-tuning of MusicGen's language model, on one device or on many."""
