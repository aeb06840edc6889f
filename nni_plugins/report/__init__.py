"""What a search found, as a table, a Pareto plot and a page to keep.

It takes plain figures (:class:`~nni_plugins.report.findings.Findings`) and knows nothing of NNI or of torch; but for
``inspect*.py``, behind ``nni-plugins inspect``, which look at a model themselves.
"""
