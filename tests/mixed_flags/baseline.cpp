#define ATTEND attend_baseline
#include "attend.inc"
