"""The parts of the training examples: settings, data, models, runs, plots."""
