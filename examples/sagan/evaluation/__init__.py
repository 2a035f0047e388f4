"""How good a generator is: FID, Inception Score, KID, intra-FID, precision and recall, each with its protocol."""
