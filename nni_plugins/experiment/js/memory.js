// V8 lets garbage lie while memory is there, so that a manager grows for hours. It idles most of the time: it collects.
'use strict';

const v8 = require('v8');
const vm = require('vm');

module.exports = ({ settings }) => {
    if (settings.collect) {
        v8.setFlagsFromString('--expose-gc');
        setInterval(vm.runInNewContext('gc'), settings.collect * 1000).unref();
    }
    return [];
};
