"""The parts of the GPT example: settings, data, model, training, checkpoints, plots."""
