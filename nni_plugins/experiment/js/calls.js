// NNI waits for ever for the answer of a machine that is lost, and starts no trial anywhere meanwhile: end the wait.
'use strict';

module.exports = () => [['/common/command_channel/rpc_util.js', patch]];

function patch({ RpcHelper }) {
    const waitResponse = RpcHelper.prototype.waitResponse;
    RpcHelper.prototype.waitResponse = function (id) {
        if (!this.lost) {
            this.lost = new Set();
            const end = () => this.lost.forEach(reject => reject(new Error('the connection to the machine is lost')));
            this.channel.onError(end);
            this.channel.onClose(end);
        }
        return new Promise((resolve, reject) => {
            this.lost.add(reject);
            waitResponse.call(this, id).then(resolve, reject).finally(() => {
                this.lost.delete(reject);
                this.responses.delete(id); // NNI keeps every answer
            });
            if (this.channel.closing) {
                reject(new Error('the connection to the machine is lost'));
            }
        });
    };
}
