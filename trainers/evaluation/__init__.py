"""From trained logits to results: inference, metrics, test-time adaptation, target priors, ensembles."""
