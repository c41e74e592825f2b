"""Measuring a model on text: sparsity, predictors, precision mixes."""
