"""CRAFT: frozen Tucker factors of the stacked weights, one small trained matrix per mode."""
