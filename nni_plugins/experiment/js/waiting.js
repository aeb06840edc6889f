// NNI does not say why it starts no trial, and asks again without a pause: say it, and pause. A trial that is resumed
// gets the first place that is free, under the name that it has.
'use strict';

const { setTimeout: sleep } = require('timers/promises');

module.exports = ({ note }) => {
    const reasons = new Map(); // of each machine that took no trial since the last one that did
    let told = null;
    function tell(name, reason) {
        if (reason === null) {
            reasons.clear();
        } else {
            reasons.set(name, reason);
        }
        const words = [...reasons].sort().map(([machine, why]) => machine ? `${machine}: ${why}` : why).join('; ');
        if (words !== told) {
            told = words;
            note(words ? { kind: 'waiting', reason: words } : { kind: 'started' });
        }
    }

    function watch(Service, environment) {
        const createTrial = Service.prototype.createTrial;
        Service.prototype.createTrial = async function (...args) {
            const resumed = args[4] !== undefined; // NNI would give it another name, and keep this one as running
            for (;;) {
                const [info, name, settings, gone] = environment(this, args[0]);
                try {
                    const trial = await createTrial.apply(this, args);
                    if (trial !== null) {
                        tell(name, null);
                        return trial;
                    }
                    tell(name, whyNot(info, this.config.trialGpuNumber, settings));
                } catch (error) {
                    this.log.error('Exception when creating a trial:', error);
                    tell(name, `the trial could not be started (${String(error.message).split('\n').slice(0, 2).join(' ')})`);
                }
                await sleep(1000);
                if (!resumed || gone) {
                    return null;
                }
            }
        };
    }

    return [
        ['/training_service/local_v3/local.js', ({ LocalTrainingServiceV3 }) =>
            watch(LocalTrainingServiceV3, service =>
                [service.trialKeeper.envInfo, 'this machine', service.config, false])],
        ['/training_service/remote_v3/remote.js', ({ RemoteTrainingServiceV3 }) =>
            watch(RemoteTrainingServiceV3, (service, envId) => {
                const worker = service.workersByEnv.get(envId);
                return [worker?.env, worker ? worker.config.host : envId, worker?.config ?? {}, !worker];
            })],
        ['/training_service/v3/compat.js', ({ V3asV1 }) => {
            const schedule = V3asV1.prototype.schedule;
            V3asV1.prototype.schedule = function () {
                const environment = schedule.call(this);
                if (environment === null) {
                    reasons.clear();
                    tell('', 'no machine can be reached');
                }
                return environment;
            };
            const submit = V3asV1.prototype.submitTrialJob;
            V3asV1.prototype.submitTrialJob = async function (form) {
                await this.startDeferred.promise;
                while (form.id && !this.environments.some(one => one.id === form.envId)) {
                    form.envId = this.schedule(); // the machine that had it has another name since it came back
                    if (form.envId === null) {
                        await sleep(1000);
                    }
                }
                return submit.call(this, form);
            };
        }],
    ];
};

// Why a machine takes no trial, from what NNI knows of its GPUs.
function whyNot(environment, wanted, settings) {
    const gpus = environment?.gpu?.gpus;
    if (!wanted || !gpus) {
        return 'the trial could not be started; see log/nnimanager.log';
    }
    const allowed = settings.gpuIndices ? gpus.filter(gpu => settings.gpuIndices.includes(gpu.index)) : gpus;
    if (allowed.length < wanted) {
        return `a trial asks for ${wanted} GPUs (trialGpuNumber), and there are ${allowed.length}`;
    }
    const busy = new Set((environment.gpu.processes ?? []).map(process => process.gpuIndex));
    const free = settings.useActiveGpu ? allowed : allowed.filter(gpu => !busy.has(gpu.index));
    if (free.length < wanted) {
        return `${allowed.length - free.length} of ${allowed.length} GPUs are busy with other programs `
            + '(useActiveGpu: true would share them)';
    }
    return 'no GPU is free; all are taken by running trials';
}
