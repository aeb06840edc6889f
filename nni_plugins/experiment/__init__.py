"""Run an NNI experiment from start to report: launch, follow, stop, read its trials, finish with its winner.

``nni-plugins run`` is this package; everything in it also works on an experiment that ``nnictl create`` started.

- :mod:`.folders`: where a trial writes, and what is found there
- :mod:`.trials`: one trial as NNI tells of it, over REST (running) or from its database (stopped)
- :mod:`.manager`: one running NNI manager, over its REST API
- :mod:`.manifest`: the experiments that NNI knows on this machine
- :mod:`.launch`: from ``config.yml`` to a running manager, and its orderly stop
- :mod:`.follow`: wait and show progress
- :mod:`.finish`: the winner, evaluated on the test split once, proved, and written out
- :mod:`.guard`: what keeps a trial process alone in its folder, and no longer alive than its manager
"""
