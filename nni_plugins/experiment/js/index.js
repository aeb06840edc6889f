// Loaded into NNI's node processes before anything else (NODE_OPTIONS=--require), by nni_plugins/experiment/node.py.
//
// What NNI's own code does not do, one file each; nothing is changed on disk:
//   loopback.js  listens on this machine only
//   manager.js   waits for a slow tuner and a read database, notices a dead tuner and a killed trial
//   groups.js    ends all processes of a trial with it, and with the manager
//   ssh.js       knows its machines by their keys, leads workers back through the SSH connection, reconnects
//   calls.js     ends calls to a machine that is lost
//   parameters.js gives each trial its own parameters
//   gpus.js      gives a trial all GPUs of a machine where it asks for all
//   memory.js    collects garbage, forgets trials that are over
//   waiting.js   says why no trial is started; starts resumed trials under their own names
'use strict';

const fs = require('fs');
const Module = require('module');
const path = require('path');

const settings = JSON.parse(process.env.NNI_PLUGINS_NODE || '{}');
for (const [name, value] of Object.entries({ NNI_PLUGINS_NODE: null, NODE_OPTIONS: settings.nodeOptions })) {
    if (value) {
        process.env[name] = value;
    } else {
        delete process.env[name]; // trials and tuners get the environment of this process
    }
}

function option(name) {
    const index = process.argv.indexOf(name);
    return index < 0 ? undefined : process.argv[index + 1];
}

// One line of JSON in log/machines.jsonl of the experiment's folder; `nni-plugins status` reads it.
const experiments = option('--experiments-directory');
const log = experiments ? path.join(experiments, option('--experiment-id') || '', 'log', 'machines.jsonl') : null;
function note(event) {
    if (log) {
        try {
            fs.appendFileSync(log, JSON.stringify({ time: Date.now() / 1000, ...event }) + '\n'); // their order counts
        } catch {
            // a full disk stops no experiment for a note
        }
    }
}

note({ kind: 'begun' }); // what was noted of machines before is over

const context = { settings, note, port: Number(option('--port')) };
const patches = [];
for (const part of ['loopback', 'memory', 'manager', 'gpus', 'waiting', 'calls', 'parameters', 'groups', 'ssh']) {
    patches.push(...require('./' + part)(context));
}

// Each patch is [a file's path in nni_node, what is done with its exports].
const load = Module.prototype.load;
Module.prototype.load = function (filename) {
    const result = load.call(this, filename);
    const unix = filename.replaceAll('\\', '/');
    for (const [ending, patch] of patches) {
        if (unix.endsWith('/nni_node' + ending)) {
            patch(this.exports);
        }
    }
    return result;
};
