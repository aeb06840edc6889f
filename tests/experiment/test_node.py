"""What is loaded into NNI's manager, on NNI's own modules."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nni_node
import pytest

from nni_plugins.experiment.node import node_environment

NODE = Path(nni_node.__path__[0])
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="names of POSIX")


def run(script: str, *arguments: str, **settings: Any) -> Any:
    """What the script prints last, with our files loaded as they are into a manager with remote machines."""
    head = "require('app-module-path').addPath(process.cwd()); \n"
    head += "require('common/globals').default.args = { logLevel: 'critical' };\n"
    keys = {"127.0.0.1:1": {"ssh-ed25519": "AAAA"}}
    environment = node_environment({}, keys=keys)
    environment["NNI_PLUGINS_NODE"] = json.dumps({**json.loads(environment["NNI_PLUGINS_NODE"]), **settings})
    answer = subprocess.run(
        [str(NODE / "node"), "-e", head + script, "--", *arguments],
        cwd=NODE,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout.strip().splitlines()[-1])


def test_a_call_to_a_machine_that_is_lost_ends() -> None:
    script = """
    const { WsChannel } = require('common/command_channel/websocket/channel');
    const { getRpcHelper } = require('common/command_channel/rpc_util');
    (async () => {
        const channel = new WsChannel('test');
        channel.onError(() => {});
        const helper = getRpcHelper(channel);
        const said = [];
        const answered = helper.call(1, 'start');
        channel.emitter.emit('rpc_response', { type: 'rpc_response', id: 1, result: 'well' });
        said.push(await answered, helper.responses.size);
        const first = helper.call(1, 'createTrial').catch(error => said.push(error.message));
        channel.terminate('test');
        await first;
        await helper.call(1, 'stopTrial').catch(error => said.push(error.message));
        console.log(JSON.stringify(said));
        process.exit(0);
    })();
    """
    assert run(script) == ["well", 0, *["the connection to the machine is lost"] * 2]


def test_a_machine_that_comes_back_slowly_is_tried_once_at_a_time() -> None:
    script = """
    const net = require('net');
    const { Client } = require('ssh2');
    let tries = [];
    const server = net.createServer(socket => {
        tries.push(performance.now());
        socket.on('error', () => {});
        setTimeout(() => socket.resetAndDestroy(), 50); // two errors: the reset, and the end before a greeting
        if (tries.length === 3) {
            setTimeout(() => {
                console.log(JSON.stringify(tries.slice(1).map((time, index) => (time - tries[index]) / 1000)));
                process.exit(0);
            }, 500); // the next one is after four seconds
        }
    });
    server.listen(0, () => {
        const config = { host: '127.0.0.1', port: server.address().port, username: 'me', password: 'x' };
        const first = new Client();
        first.on('ready', () => {});
        first.emit('ready'); // it was there before
        first.on('close', () => { tries = []; new Client().connect(config); });
        first.connect(config);
        first.emit('ready');
    });
    """
    first, second = run(script)  # one second, and two
    assert first > 0.9
    assert second > 1.8


def test_machines_that_wait_in_turn_are_said_once(tmp_path: Path) -> None:
    (tmp_path / "exp" / "log").mkdir(parents=True)
    script = """
    const { RemoteTrainingServiceV3 } = require('training_service/remote_v3/remote');
    (async () => {
        const service = Object.create(RemoteTrainingServiceV3.prototype);
        service.config = { trialGpuNumber: 1 };
        service.log = { warning() {}, info() {} };
        service.workersByEnv = new Map();
        service.workersByTrial = new Map();
        let free = false;
        for (const host of ['a', 'b']) {
            const trialKeeper = { createTrial: async () => free };
            const env = { gpu: { gpus: [{ index: 0 }], processes: [] } };
            service.workersByEnv.set(host, { trialKeeper, env, config: { host, maxTrialNumberPerGpu: 1 } });
        }
        for (const host of ['a', 'b', 'a']) {
            await service.createTrial(host, 'python', 'code', 0);
        }
        setTimeout(() => { free = true; }, 500);
        const resumed = await service.createTrial('b', 'python', 'code', 0, 'name'); // has a name: waits for its place
        setTimeout(() => { console.log(JSON.stringify(resumed)); process.exit(0); }, 100);
    })();
    """
    assert run(script, "--experiments-directory", str(tmp_path), "--experiment-id", "exp") == "name"
    lines = (tmp_path / "exp" / "log" / "machines.jsonl").read_text(encoding="utf-8").splitlines()
    free = "no GPU is free; all are taken by running trials"
    assert [(event["kind"], event.get("reason")) for event in map(json.loads, lines)] == [
        ("begun", None),
        ("waiting", f"a: {free}"),
        ("waiting", f"a: {free}; b: {free}"),
        ("started", None),
    ]


def test_a_trial_that_dies_before_it_asks_takes_no_parameters_of_another() -> None:
    script = """
    const factory = require('training_service/v3/factory');
    const sent = {};
    let ask, count = 0;
    factory.trainingServiceFactoryV3 = () => ({
        init: async () => {}, start: async () => [{ id: 'here', host: 'a' }], uploadDirectory: async () => {},
        createTrial: async () => `trial${count++}`,
        sendParameter: async (trial, value) => { sent[trial] = value; },
        onRequestParameter: callback => { ask = callback; },
        onMetric() {}, onTrialStart() {}, onTrialEnd() {}, onEnvironmentUpdate() {},
    });
    require('common/globals').default.paths = { experimentRoot: '/nowhere' };
    const { V3asV1 } = require('training_service/v3/compat');
    (async () => {
        const service = new V3asV1({ trialCommand: 'python' });
        service.run();
        for (const value of ['first', 'second']) {
            await service.submitTrialJob({ sequenceId: 0, hyperParameters: { value, index: 0 } });
        }
        await ask('trial1'); // the other one is gone
        console.log(JSON.stringify(sent));
        process.exit(0);
    })();
    """
    assert run(script) == {"trial1": "second"}


def test_the_files_of_a_trials_output_are_whole_and_not_left_open(tmp_path: Path) -> None:
    script = """
    const fs = require('fs');
    const { TrialProcess } = require('common/trial_keeper/process');
    const globals = require('common/globals').default;
    globals.args.experimentId = 'test';
    const folder = process.argv[process.argv.length - 1];
    const count = () => fs.readdirSync('/proc/self/fd').length;
    (async () => {
        const run = async (number) => {
            const output = folder + '/' + number;
            fs.mkdirSync(output);
            const trial = new TrialProcess('trial' + number);
            const ended = new Promise(resolve => trial.onStop(resolve));
            const options = { command: 'sleep 0.1; echo out; echo err >&2', codeDirectory: folder,
                              outputDirectory: output, commandChannelUrl: '', platform: 'local' };
            if (!await trial.spawn(options)) { throw new Error('not started'); }
            await ended;
        };
        const sleep = time => new Promise(resolve => setTimeout(resolve, time));
        await run(0);
        let before = count();
        for (let turn = 0; turn < 10; turn++) { await sleep(20); before = Math.min(before, count()); }
        for (let number = 1; number < 6; number++) { await run(number); }
        for (let turn = 0; turn < 200 && count() - before > 1; turn++) { await sleep(50); } // closing takes a moment
        console.log(JSON.stringify(count() - before));
        process.exit(0);
    })();
    """
    assert run(script, str(tmp_path)) <= 1  # NNI by itself: two for each trial
    for number in range(6):
        assert (tmp_path / str(number) / "trial.stdout").read_text(encoding="utf-8") == "out\n"
        assert (tmp_path / str(number) / "trial.stderr").read_text(encoding="utf-8") == "err\n"


def test_why_a_trial_was_killed_is_there_when_its_end_is_told(tmp_path: Path) -> None:
    script = """
    const fs = require('fs');
    const { TrialProcess } = require('common/trial_keeper/process');
    require('common/globals').default.args.experimentId = 'test';
    const folder = process.argv[process.argv.length - 1];
    (async () => {
        const trial = new TrialProcess('trial');
        trial.onStop(() => {
            console.log(fs.readFileSync(folder + '/failure.json', 'utf8').replaceAll('\\n', ''));
            setTimeout(() => process.exit(0), 100); // it hears of the end twice
        });
        await trial.spawn({ command: 'kill -9 $$', codeDirectory: folder, outputDirectory: folder,
                            commandChannelUrl: '', platform: 'local' });
    })();
    """
    assert run(script, str(tmp_path)) == {
        "reason": "it was killed by SIGKILL; the machine may be out of memory",
        "error": "SIGKILL",
        "parameters": {},
    }
    said = (tmp_path / "trial.log").read_text(encoding="utf-8")
    assert said == "it was killed by SIGKILL; the machine may be out of memory\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("failure.json", "trial.log", "trial.stderr", "trial.stdout")
    ]


@pytest.mark.parametrize(("collect", "gone"), [(0.05, True), (0, False)])
def test_garbage_is_collected_and_new_objects_have_little_room(collect: float, gone: bool) -> None:
    script = """
    let gone = false;
    const registry = new FinalizationRegistry(() => { gone = true; });
    (() => registry.register({ much: new Array(1000).fill(0) }, 1))();
    let kept = [];
    for (let i = 0; i < 300000; i++) { kept.push({ i }); }
    kept = null;
    const room = require('v8').getHeapSpaceStatistics().find(one => one.space_name === 'new_space').space_size;
    const tell = () => { console.log(JSON.stringify({ gone, room })); process.exit(0); };
    setTimeout(tell, SECONDS * 1000);
    setInterval(() => { if (gone) { tell(); } }, 20);
    """.replace("SECONDS", "20" if gone else "0.6")
    environment = node_environment({})
    settings = {**json.loads(environment["NNI_PLUGINS_NODE"]), "collect": collect}
    environment["NNI_PLUGINS_NODE"] = json.dumps(settings)
    answer = subprocess.run(
        [str(NODE / "node"), "-e", script],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = json.loads(answer.stdout)
    assert found["room"] <= 3 * 2 * 2**20
    assert found["gone"] is gone


def test_a_trial_that_is_over_is_forgotten_and_may_be_stopped_all_the_same(tmp_path: Path) -> None:
    script = """
    const globals = require('common/globals').default;
    Object.assign(globals.args, { experimentId: 'test' });
    globals.paths = { experimentRoot: process.argv[process.argv.length - 1] };
    globals.rest = { urlJoin: (...parts) => parts.join('/'), getFullUrl: () => '' };
    const later = setTimeout;
    global.setTimeout = (work, time) => later(work, time === 10000 ? 300 : time);
    const { TrialKeeper } = require('common/trial_keeper/keeper');
    const sleep = time => new Promise(resolve => later(resolve, time));
    (async () => {
        const keeper = new TrialKeeper('here', 'local', false);
        keeper.scheduler = { schedule: async () => ({}), release() {} };
        keeper.registerDirectory('code', globals.paths.experimentRoot);
        const known = [];
        for (const id of ['a', 'b']) {
            keeper.channels.getOutgoingQueue(id);
            await keeper.createTrial({ id, command: id === 'a' ? 'true' : 'sleep 60', codeDirectoryName: 'code' });
        }
        known.push([...keeper.trials.keys()].join());
        await sleep(900);
        known.push([...keeper.trials.keys()].join(), [...keeper.channels.outgoingQueues.keys()].join());
        await keeper.stopTrial('a');
        await keeper.stopTrial('b');
        await sleep(600);
        known.push(keeper.trials.size, keeper.channels.outgoingQueues.size);
        console.log(JSON.stringify(known));
        process.exit(0);
    })();
    """
    assert run(script, str(tmp_path)) == ["a,b", "b", "b", 0, 0]


@pytest.mark.parametrize("shell", ["sh", "csh", "fish", "zsh"])
def test_what_nni_runs_on_a_machine_works_in_its_users_shell(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    script = """
    const { spawn } = require('child_process');
    const EventEmitter = require('events');
    const { Ssh } = require('training_service/remote_v3/ssh');
    (async () => {
        const ssh = new Ssh('abc', {});
        ssh.client = { _sock: { writable: true }, exec(command, done) { // as sshd does it, with the login shell
            const one = spawn(process.argv[1], ['-c', command]);
            const stream = Object.assign(new EventEmitter(), { stderr: one.stderr });
            one.stdout.on('data', data => stream.emit('data', data));
            one.on('close', code => stream.emit('close', code, null));
            done(null, stream);
        } };
        ssh.setPath("/my 'own' bin:/usr/bin:/bin");
        console.log(JSON.stringify(await ssh.run(`printenv PATH`)));
    })();
    """
    assert run(script, shutil.which(shell) or "") == "/my 'own' bin:/usr/bin:/bin"


def test_a_result_that_is_no_number_does_not_reach_a_tuner_that_dies_of_it() -> None:
    script = """
    const { NNIManager } = require('core/nnimanager');
    const passed = [];
    (async () => {
      for (const [tuner, assessor, type, value] of JSON.parse(process.argv[process.argv.length - 1])) {
        const received = [];
        const manager = Object.create(NNIManager.prototype);
        Object.assign(manager, { experimentProfile: { params: { tuner, assessor } }, trialJobs: new Map([['t', {}]]) });
        manager.log = { debug() {}, info() {}, warning() {}, error() {} };
        manager.dataStore = { storeMetricData: async (_id, data) => received.push(data) };
        manager.dispatcher = { sendCommand() {} };
        await manager.onTrialJobMetrics({ id: 't', data: JSON.stringify({ type, value: JSON.stringify(value) }) });
        passed.push(received.length);
      }
      console.log(JSON.stringify(passed));
      process.exit(0);
    })();
    """
    tpe, custom = {"name": "TPE"}, {"className": "mine.Tuner"}
    cases: list[tuple[Any, Any, str, Any, int]] = [
        (tpe, None, "FINAL", 0.5, 1),
        (tpe, None, "FINAL", {"default": 1, "more": "text"}, 1),
        (tpe, None, "FINAL", {"default": "x"}, 0),
        (tpe, None, "FINAL", {"__nni_obj__": "gAWV"}, 0),
        (custom, None, "FINAL", [1, 2], 1),
        (tpe, None, "PERIODICAL", "text", 1),
        (tpe, {"name": "Medianstop"}, "PERIODICAL", "text", 0),
    ]
    assert run(script, json.dumps([case[:4] for case in cases])) == [case[4] for case in cases]


def test_what_outlives_its_trial_ends_too(tmp_path: Path) -> None:
    script = """
    const fs = require('fs');
    const { TrialProcess } = require('common/trial_keeper/process');
    require('common/globals').default.args.experimentId = 'test';
    const folder = process.argv[process.argv.length - 1];
    const alive = () => { try { return process.kill(Number(fs.readFileSync(folder + '/left', 'utf8')), 0); }
                          catch { return false; } };
    const sleep = time => new Promise(resolve => setTimeout(resolve, time));
    (async () => {
        const trial = new TrialProcess('trial');
        const ended = new Promise(resolve => trial.onStop((_time, code) => resolve(code)));
        await trial.spawn({ command: 'sleep 60 & echo $! > left', codeDirectory: folder, outputDirectory: folder,
                            commandChannelUrl: '', platform: 'local' });
        const said = [await ended, alive()];
        for (let turn = 0; turn < 100 && alive(); turn++) { await sleep(50); }
        console.log(JSON.stringify([...said, alive()]));
        process.exit(0);
    })();
    """
    assert run(script, str(tmp_path), grace=600) == [0, True, False]
