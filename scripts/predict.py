"""Predict a table's rows: ``portable-mlp predict``, from a clone.

python scripts/predict.py runs/latest/model.safetensors new.csv --out predictions.csv
"""

import sys

from portable_mlp.cli import main

sys.exit(main(["predict", *sys.argv[1:]]))
