"""Statistics: what layers saw in a recorded pass, and running averages of the factors.

In come a module's forward pass (``capture``) and scalars of its output; out go the uses of every
block's layers (``uses``), with their samples first (``samples``, ``owners``), the factors that
layouts make of them (``factors``) and averages over batches (``averages``).
"""
