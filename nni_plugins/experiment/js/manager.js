// What ends or stalls NNI's manager without a word: a tuner that is slow to start or dies, or that is of a killed
// manager, a database that another process reads, files that stay open, a trial that is killed or reports what is no
// number.
'use strict';

const crypto = require('crypto');
const fs = require('fs');
const path = require('path');

const TUNER_SECONDS = 180; // NNI: 10, which a busy machine does not keep
const DATABASE_SECONDS = 60; // NNI: 1, and then the experiment ends
const NUMBERS = /^(TPE|Random|Anneal|Evolution|Batch(Tuner)?|GridSearch|SMAC|Metis(Tuner)?|GP(Tuner)?|PBT(Tuner)?|DNGO(Tuner)?|Hyperband|BOHB)$/i;
const OVER = ['ERROR', 'STOPPING', 'STOPPED'];

// Why a result cannot be used. NNI's own tuners die of one that is no number, now and in every resume.
function refused(data, finalIsNumber, everyIsNumber) {
    let metric, value;
    try {
        metric = JSON.parse(data);
        value = JSON.parse(metric.value);
    } catch (error) {
        return 'it reported NaN or infinity, which NNI cannot keep';
    }
    const asked = metric.type === 'FINAL' ? finalIsNumber : everyIsNumber;
    const number = value !== null && typeof value === 'object' && !Array.isArray(value) && 'default' in value
        ? value.default : value;
    if (!asked || typeof number === 'number' || typeof number === 'boolean') {
        return '';
    }
    const object = value !== null && typeof value === 'object';
    const said = object && ('__nni_obj__' in value || '__ndarray__' in value) ? 'a tensor or another object'
        : object && !Array.isArray(value) && !('default' in value) ? 'a dictionary without "default"'
        : JSON.stringify(number).slice(0, 40);
    return `it reported ${said}; a result must be a number, or a dictionary with a number as "default"`;
}

module.exports = ({ note }) => {
    let tuner = null;
    let tunerName = null; // by which it comes, and no other
    let tunerGone = null; // called when the tuner's process ends

    function patchUtils(utils) {
        const start = utils.getTunerProc;
        utils.getTunerProc = (command, stdio, folder, environment, ...rest) => {
            tunerName = crypto.randomBytes(16).toString('hex');
            const url = `${environment.NNI_TUNER_COMMAND_CHANNEL}/${tunerName}`;
            tuner = start(command, stdio, folder, { ...environment, NNI_TUNER_COMMAND_CHANNEL: url }, ...rest);
            tuner.once('exit', (code, signal) => tunerGone?.(signal ? `signal ${signal}` : `exit status ${code}`));
            return tuner;
        };
    }

    // The tuner of a manager that was killed tries for some seconds to come back, and would take this one's place.
    function patchServer({ WsChannelServer }) {
        const handleConnection = WsChannelServer.prototype.handleConnection;
        WsChannelServer.prototype.handleConnection = function (channel, socket) {
            if (this.path === 'tuner' && channel !== tunerName && !process.argv.includes('--tuner-command-channel')) {
                socket.close(4001, 'not the tuner of this manager');
                return;
            }
            handleConnection.call(this, channel, socket);
        };
    }

    function patchChannel({ getTunerServer }) {
        Object.getPrototypeOf(getTunerServer()).init = async function () {
            const late = setTimeout(() => this.connect.reject(
                new Error(`the tuner did not start in ${TUNER_SECONDS} seconds; see log/dispatcher.log`)),
            TUNER_SECONDS * 1000);
            try {
                await this.connect.promise;
            } finally {
                clearTimeout(late);
            }
        };
    }

    function patchManager({ NNIManager }) {
        const setup = NNIManager.prototype.setupTuner;
        NNIManager.prototype.setupTuner = async function (...args) {
            tunerGone = how => {
                if (!OVER.includes(this.status.status)) {
                    this.criticalError(new Error(`the tuner's process ended (${how}); see log/dispatcher.log`));
                }
            };
            return setup.apply(this, args);
        };
        const recover = NNIManager.prototype.addRecoveredTrialJob;
        NNIManager.prototype.addRecoveredTrialJob = function (jobs) {
            const count = recover.call(this, jobs);
            for (const job of jobs) { // NNI counts the unfinished ones only, and gives numbers twice
                this.experimentProfile.nextSequenceId = Math.max(
                    this.experimentProfile.nextSequenceId, (job.sequenceId ?? -1) + 1);
            }
            return count;
        };
        const setStatus = NNIManager.prototype.setStatus;
        NNIManager.prototype.setStatus = function (status) {
            if (status === 'TUNER_NO_MORE_TRIAL' || (status === 'RUNNING' && this.status.status !== status)) {
                note({ kind: status === 'RUNNING' ? 'running' : 'exhausted' });
            }
            return setStatus.call(this, status);
        };
        const onMetrics = NNIManager.prototype.onTrialJobMetrics;
        NNIManager.prototype.onTrialJobMetrics = async function (metric) {
            const { tuner, assessor } = this.experimentProfile?.params ?? {};
            const why = refused(String(metric.data), NUMBERS.test(tuner?.name ?? ''), Boolean(assessor));
            if (why) {
                note({ kind: 'bad metric', trial: metric.id, metric: String(metric.data).slice(0, 300), why });
                return undefined; // NNI ends the whole experiment for a NaN
            }
            return onMetrics.call(this, metric);
        };
    }

    function patchDatabase({ SqlDB }) {
        const init = SqlDB.prototype.init;
        SqlDB.prototype.init = async function (...args) {
            const result = await init.apply(this, args);
            this.db.configure('busyTimeout', DATABASE_SECONDS * 1000);
            return result;
        };
    }

    // Whole, and before NNI tells anybody that the trial has ended: whoever hears of it reads why.
    function keep(folder, failure) {
        const file = path.join(folder, 'failure.json');
        if (fs.existsSync(file)) {
            return; // the trial said so itself, or this process before
        }
        try {
            fs.writeFileSync(`${file}.part`, JSON.stringify(failure, null, 2));
            fs.renameSync(`${file}.part`, file);
            fs.appendFileSync(path.join(folder, 'trial.log'), failure.reason + '\n');
        } catch {
            // a full disk stops no experiment for a reason
        }
    }

    // A trial that is killed from outside has failed; NNI takes it for one that somebody cancelled.
    function patchTrial({ TrialProcess }) {
        const { spawn, kill, resolveStop } = TrialProcess.prototype;
        TrialProcess.prototype.spawn = async function (options) {
            this.folder = options.outputDirectory;
            const files = []; // of its output, which NNI opens and leaves open: a long search would run out of them
            const open = fs.createWriteStream;
            fs.createWriteStream = (...args) => {
                const file = open(...args);
                files.push(file);
                return file;
            };
            let started;
            try {
                started = spawn.call(this, options); // opens them before it first waits
            } finally {
                fs.createWriteStream = open;
            }
            try {
                return await started;
            } finally {
                files.forEach(file => file.destroy()); // the trial has its own handles
            }
        };
        TrialProcess.prototype.kill = function (...args) {
            this.wanted = true;
            return kill.apply(this, args);
        };
        TrialProcess.prototype.resolveStop = function (event, code, signal, ...rest) {
            if (signal && !this.wanted) {
                const hint = signal === 'SIGKILL' ? '; the machine may be out of memory' : '';
                keep(this.folder, { reason: `it was killed by ${signal}${hint}`, error: signal, parameters: {} });
                return resolveStop.call(this, event, 128, null, ...rest);
            }
            if (code && this.wanted) { // torchrun and others end with a status of their own when they are stopped
                return resolveStop.call(this, event, null, 'SIGINT', ...rest);
            }
            return resolveStop.call(this, event, code, signal, ...rest);
        };
    }

    return [
        ['/common/utils.js', patchUtils],
        ['/common/command_channel/websocket/server.js', patchServer],
        ['/core/tuner_command_channel.js', patchChannel],
        ['/core/nnimanager.js', patchManager],
        ['/core/sqlDatabase.js', patchDatabase],
        ['/common/trial_keeper/process.js', patchTrial],
    ];
};
