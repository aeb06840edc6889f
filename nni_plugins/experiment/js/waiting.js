// NNI does not say why it starts no trial, and asks again without a pause. Say it, and pause.
'use strict';

const { setTimeout: sleep } = require('timers/promises');

module.exports = ({ note }) => {
    let told = null;
    function tell(reason) {
        if (reason !== told) {
            told = reason;
            note(reason ? { kind: 'waiting', reason } : { kind: 'started' });
        }
    }

    function watch(Service, environment) {
        const createTrial = Service.prototype.createTrial;
        Service.prototype.createTrial = async function (envId, ...rest) {
            const trial = await createTrial.call(this, envId, ...rest);
            if (trial === null) {
                const [info, name, settings] = environment(this, envId);
                tell(`${name}: ${whyNot(info, this.config.trialGpuNumber, settings)}`);
                await sleep(1000);
            } else {
                tell(null);
            }
            return trial;
        };
    }

    return [
        ['/training_service/local_v3/local.js', ({ LocalTrainingServiceV3 }) =>
            watch(LocalTrainingServiceV3, service => [service.trialKeeper.envInfo, 'this machine', service.config])],
        ['/training_service/remote_v3/remote.js', ({ RemoteTrainingServiceV3 }) =>
            watch(RemoteTrainingServiceV3, (service, envId) => {
                const worker = service.workersByEnv.get(envId);
                return [worker?.env, worker ? worker.config.host : envId, worker?.config ?? {}];
            })],
        ['/training_service/v3/compat.js', ({ V3asV1 }) => {
            const schedule = V3asV1.prototype.schedule;
            V3asV1.prototype.schedule = function () {
                const environment = schedule.call(this);
                if (environment === null) {
                    tell('no machine can be reached');
                }
                return environment;
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
