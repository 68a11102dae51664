// FOR_EACH_CPU before a function compiles it for several CPUs; the one for the CPU at hand is taken when it is loaded.

#ifndef HPCTRAIN_NATIVE_EACH_CPU_H_
#define HPCTRAIN_NATIVE_EACH_CPU_H_

#if defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

#endif  // HPCTRAIN_NATIVE_EACH_CPU_H_
