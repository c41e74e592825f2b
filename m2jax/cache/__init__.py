"""The neuron cache: which neurons hold a slot. Its decisions need NumPy only."""
