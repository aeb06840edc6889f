from nni_plugins.experiment.errors import ExperimentError


def finish(known, output, say):
    raise ExperimentError(f"not yet: {known.trials()}")
