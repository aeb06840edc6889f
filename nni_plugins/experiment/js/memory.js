// V8 lets garbage lie while memory is there, so that a manager grows for hours: it collects soon after some came together.
// A collection takes about 50 ms; a manager that has nothing to do makes no garbage, and does not collect. And NNI keeps
// what it knows of the process of each trial for ever, 4 KB: let it go soon after the trial's end.
'use strict';

const v8 = require('v8');
const vm = require('vm');

const GARBAGE = 2 * 2 ** 20; // bytes, or a tenth of what was left the last time
const LINGER = 10000; // milliseconds in which what a trial has started may still speak

module.exports = ({ settings }) => {
    if (settings.collect) {
        v8.setFlagsFromString('--expose-gc');
        const collect = vm.runInNewContext('gc');
        const used = () => v8.getHeapStatistics().used_heap_size;
        let left = 0;
        setInterval(() => {
            if (used() > left + Math.max(GARBAGE, left / 10)) {
                collect();
                left = used();
            }
        }, settings.collect * 1000).unref();
    }
    return [['/common/trial_keeper/keeper.js', patch]];
};

function patch({ TrialKeeper }) {
    const { createTrial, stopTrial } = TrialKeeper.prototype;
    TrialKeeper.prototype.createTrial = async function (options) {
        const created = await createTrial.call(this, options);
        const { id } = options;
        const trial = this.trials.get(id);
        trial?.onStop(() => setTimeout(() => {
            if (this.trials.get(id) === trial) { // and not one more of this name
                this.trials.delete(id);
                this.channels.outgoingQueues.delete(id);
            }
        }, LINGER).unref());
        return created;
    };
    TrialKeeper.prototype.stopTrial = async function (id) {
        if (this.trials.has(id)) {
            await stopTrial.call(this, id);
        }
    };
}
