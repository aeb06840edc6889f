// NNI gives parameters to whichever trial asks first: one that dies before it asks leaves the others with those of their
// neighbours, and the tuner dies of a result that it does not expect. Give each trial its own.
'use strict';

module.exports = () => [['/training_service/v3/compat.js', patch]];

function patch({ V3asV1 }) {
    const submit = V3asV1.prototype.submitTrialJob;
    V3asV1.prototype.submitTrialJob = async function (form) {
        const trial = await submit.call(this, form);
        const { value } = form.hyperParameters;
        const index = this.parameters.indexOf(value); // unless the trial asked meanwhile, and was alone to do so
        if (index >= 0) {
            this.parameters.splice(index, 1);
            this.allocatedParameters.set(trial.id, value);
        }
        return trial;
    };
}
