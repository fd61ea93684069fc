"""Train a network on a table: ``portable-mlp train``, from a clone.

python scripts/train.py --device cpu
python scripts/train.py --data houses.csv --target price --hidden 128,64 --device gpu
"""

import sys

from portable_mlp.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
