// NNI refuses a trial that asks for as many GPUs as a machine has (it compares with >=), and fails where none is allowed.
'use strict';

module.exports = () => [['/common/trial_keeper/task_scheduler/scheduler.js', patch]];

function patch({ TaskScheduler }) {
    const schedule = TaskScheduler.prototype.schedule;
    TaskScheduler.prototype.schedule = async function (experimentId, trialId, wanted, restrictions) {
        await this.update();
        const allowed = this.sortGpus(restrictions ?? {});
        if (wanted > 0 && allowed.length === 0) {
            return null;
        }
        if (wanted !== this.gpus.length) {
            return schedule.call(this, experimentId, trialId, wanted, restrictions);
        }
        if (allowed.length < wanted || allowed.some(gpu => gpu.util > 0)) {
            return null;
        }
        for (const gpu of allowed) {
            gpu.util = 1;
            this.trials.push({ gpuIndex: gpu.index, experimentId, trialId, util: 1 });
        }
        this.emitUpdate();
        return { CUDA_VISIBLE_DEVICES: allowed.map(gpu => gpu.index).sort((a, b) => a - b).join(',') };
    };
}
