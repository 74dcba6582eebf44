"""CRAFT: frozen Tucker factors of the stacked weights, one small trained matrix for every mode."""
