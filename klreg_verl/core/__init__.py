"""Pure functions on tensors: KL estimators, where they enter, advantages, metrics. Imports torch and numpy only."""
