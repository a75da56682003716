"""The code that travels with the weights: flat files that import torch, transformers and each other only."""
