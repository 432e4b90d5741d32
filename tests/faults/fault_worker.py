"""What each rank of a trial's job runs: the training command itself, with the preset `tiny`."""

from pathlib import Path

from megapoly.train.main import main

if __name__ == "__main__":
    main("tiny", "tiny", Path("nowhere"))
