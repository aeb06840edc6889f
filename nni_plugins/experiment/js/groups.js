// A trial may be any command: a shell, and what that starts. NNI stops the shell and leaves the rest, and a manager that
// is killed leaves everything, so that a resumed trial has a second writer in its folder. Each trial has a process group
// of its own here, which ends as a whole: when NNI stops the trial, soon after the trial itself has ended, and when the
// manager is gone.
'use strict';

const childProcess = require('child_process');

const GRACE = 5000; // milliseconds between SIGINT and SIGKILL, as NNI has it, and for what outlives its trial

// Holds the other end of a pipe of the manager, which breaks when that ends in whatever way.
const HEIR = `
trap '' INT TERM HUP
groups=' '
while read -r sign group; do
    case "$sign$groups" in
        '+'*) groups="$groups$group " ;;
        '-'*" $group "*) groups="\${groups%% $group *} \${groups#* $group }" ;;
    esac
done
for group in $groups; do kill -s INT -- "-$group"; done
for turn in 1 2 3 4 5 6 7 8 9 10; do
    left=
    for group in $groups; do kill -s 0 -- "-$group" && left="$left $group"; done
    groups=$left
    [ "$groups" ] || exit 0
    sleep 0.5
done
for group in $groups; do kill -s KILL -- "-$group"; done
`;

module.exports = ({ settings }) => {
    if (process.platform === 'win32') {
        return [];
    }
    const { spawn } = childProcess;
    const grace = settings.grace ?? GRACE;
    const groups = new Set();
    let heir = null;

    function tell(sign, group) {
        if (heir !== null) {
            heir.stdin.write(`${sign} ${group}\n`);
        } else if (groups.size > 0) {
            const one = heir = spawn('/bin/sh', ['-c', HEIR], {
                cwd: '/', detached: true, stdio: ['pipe', 'ignore', 'ignore'],
            });
            const gone = () => { heir = heir === one ? null : heir; };
            one.on('error', gone);
            one.on('exit', gone);
            one.stdin.on('error', gone);
            one.unref();
            one.stdin.unref();
            groups.forEach(each => one.stdin.write(`+ ${each}\n`));
        }
    }

    function send(group, signal) {
        try {
            return process.kill(-group, signal);
        } catch (error) {
            return false; // nothing is left of it
        }
    }

    function forget(group) {
        groups.delete(group);
        tell('-', group);
    }

    // What a trial leaves behind would hold its GPU, and write into its folder beside a resumed one.
    function end(group, deadline) {
        if (Date.now() > deadline) {
            send(group, 'SIGKILL');
            forget(group);
        } else if (send(group, 0)) {
            setTimeout(() => end(group, deadline), 200).unref();
        } else {
            forget(group);
        }
    }

    childProcess.spawn = function (command, ...rest) {
        const options = rest[rest.length - 1];
        if (!options?.env?.NNI_TRIAL_JOB_ID) {
            return spawn(command, ...rest);
        }
        const trial = spawn(command, ...rest.slice(0, -1), { ...options, detached: true });
        const group = trial.pid;
        if (group === undefined) {
            return trial; // it did not start, and says so
        }
        let stopped = 0;
        trial.kill = signal => {
            stopped = stopped || Date.now();
            return send(group, signal ?? 'SIGTERM');
        };
        trial.on('exit', () => end(group, (stopped || Date.now()) + grace));
        groups.add(group);
        tell('+', group);
        return trial;
    };
    return [];
};
