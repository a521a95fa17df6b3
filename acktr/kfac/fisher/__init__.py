"""Fisher products: the exact F v, U^T F U and dense F of a network with a loss."""
