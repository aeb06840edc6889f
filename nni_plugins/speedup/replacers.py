MASK_UPDATERS: list = []
REPLACERS: list = []
