"""The combination: losses of MGCA, PRIOR and PLACE on one pair of encoders."""
