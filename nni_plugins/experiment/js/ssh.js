// What NNI's remote service does over SSH: whom it trusts, what it runs there, how a worker comes back, and what happens
// when the connection is lost.
'use strict';

const net = require('net');

module.exports = ({ settings, note, port }) => {
    if (settings.keys === undefined) {
        return []; // not a manager with remote machines
    }
    const patience = (settings.patience ?? 600) * 1000;
    const reached = new Set();

    function patchClient(Client) {
        const connect = Client.prototype.connect;
        Client.prototype.connect = function (config) {
            const name = `${config.host}:${config.port || 22}`;
            const keys = settings.keys[name] || {};
            const types = Object.keys(keys);
            config = {
                ...config,
                keepaliveInterval: 10000,
                keepaliveCountMax: 3,
                algorithms: { serverHostKey: types.flatMap(type =>
                    type === 'ssh-rsa' ? ['rsa-sha2-512', 'rsa-sha2-256'] : [type]) },
                hostVerifier: key => Object.values(keys).includes(key.toString('base64')),
            };
            if (reached.has(name)) {
                insist(this, () => connect.call(this, config), name);
            }
            this.on('ready', () => reached.add(name));
            this.on('error', () => {}); // an error after the start would end the whole manager; the channel tells of it
            return connect.call(this, config);
        };
    }

    // A machine that was there before is tried again and again, before it is given up.
    function insist(client, again, name) {
        const deadline = Date.now() + patience;
        const emit = client.emit;
        let pause = 1000;
        let timer = null; // one attempt may end in several errors
        client.emit = function (event, ...rest) {
            if (event === 'error' && timer) {
                return true;
            }
            if (event === 'error' && Date.now() < deadline) {
                timer = setTimeout(() => { timer = null; again(); }, pause);
                pause = Math.min(2 * pause, 30000);
                return true;
            }
            if (event === 'error' || event === 'ready') {
                note({ kind: event === 'ready' ? 'back' : 'given up', machine: name });
                delete client.emit;
            }
            return emit.call(client, event, ...rest);
        };
    }

    function patchSsh({ Ssh }) {
        const exec = Ssh.prototype.exec;
        Ssh.prototype.exec = async function (command) {
            if (command.endsWith('-m pip install nni --upgrade')) {
                return { stdout: '', stderr: '', code: 0 }; // the machine was checked before
            }
            if (this.client === null || this.client._sock === undefined || !this.client._sock.writable) {
                throw new Error('the SSH connection is lost');
            }
            command = command.replace(
                '-m nni.tools.nni_manager_scripts.launch_trial_keeper', '-m nni_plugins.experiment.keeper');
            const { path } = this;
            if (path === null) {
                return exec.call(this, command);
            }
            // NNI writes PATH="..." before the command, which is for POSIX shells: the user's may be csh, or an old fish.
            this.path = null;
            try {
                return exec.call(this, `/bin/sh -c ${quoted(`PATH="${path}" ${command}`)}`);
            } finally {
                this.path = path; // read before the first wait
            }
        };
    }

    function quoted(text) {
        return `'${text.replaceAll("'", "'\\''")}'`;
    }

    // ssh -R: a port of the worker's loopback that leads here, over the connection that NNI has anyway.
    function leadBack(client) {
        return new Promise((resolve, reject) => {
            client.on('tcp connection', (_info, accept) => {
                const remote = accept();
                const local = net.connect(port, '127.0.0.1');
                remote.on('error', () => local.destroy());
                local.on('error', () => remote.destroy());
                remote.pipe(local).pipe(remote);
            });
            client.forwardIn('127.0.0.1', 0, (error, chosen) => error ? reject(error) : resolve(chosen));
        });
    }

    function patchWorker({ Worker }) {
        const launch = Worker.prototype.launchTrialKeeperDaemon;
        Worker.prototype.launchTrialKeeperDaemon = async function () {
            let back;
            try {
                back = await leadBack(this.ssh.client);
            } catch (error) {
                throw new Error(`${this.config.host} forwards no port (AllowTcpForwarding in its sshd_config): ${error}`);
            }
            this.channelUrl = this.channelUrl.replace(/^(wss?:\/\/)[^/]+\//, `$1127.0.0.1:${back}/`);
            const result = await launch.call(this);
            note({ kind: 'ready', machine: `${this.config.host}:${this.config.port}`, environment: this.envId });
            return result;
        };
    }

    function patchService({ RemoteTrainingServiceV3 }) {
        const stop = RemoteTrainingServiceV3.prototype.stopWorker;
        RemoteTrainingServiceV3.prototype.stopWorker = function (worker, ...rest) {
            const trials = [];
            this.workersByTrial.forEach((one, trial) => { if (one === worker) { trials.push(trial); } });
            note({
                kind: 'lost', machine: `${worker.config.host}:${worker.config.port}`, environment: worker.envId, trials,
            });
            return stop.call(this, worker, ...rest);
        };
    }

    return [
        ['/node_modules/ssh2/lib/client.js', patchClient],
        ['/training_service/remote_v3/ssh.js', patchSsh],
        ['/training_service/remote_v3/worker.js', patchWorker],
        ['/training_service/remote_v3/remote.js', patchService],
    ];
};
