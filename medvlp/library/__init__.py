"""What notebooks and scripts call: `medvlp.load` and `medvlp.open_dataset`."""
