// NNI's servers listen on every address, without a password, and can start any command: listen on one address instead.
'use strict';

const net = require('net');

module.exports = ({ settings }) => {
    const address = settings.listen || '127.0.0.1';
    const listen = net.Server.prototype.listen;
    net.Server.prototype.listen = function (...args) {
        const [first, second] = args;
        const port = typeof first === 'number' || (typeof first === 'string' && /^\d+$/.test(first));
        if (port && typeof second !== 'string') {
            args.splice(1, args.length > 1 && second == null ? 1 : 0, address);
        } else if (first && typeof first === 'object' && 'port' in first && !first.host && !first.path) {
            args[0] = { ...first, host: address };
        }
        return listen.apply(this, args);
    };
    return [];
};
