"""The bound: KL pairs, when they are valid, the plan of terms, and the ELBO."""
