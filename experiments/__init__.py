"""The paper's experiments: what params.yaml may say, the data sets, the figures, and running a stage."""
