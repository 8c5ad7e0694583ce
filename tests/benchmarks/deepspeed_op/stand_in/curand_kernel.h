// SPDX-License-Identifier: Apache-2.0
//
// DeepSpeed's forward kernel includes cuRAND for dropout, which its op does not use; nvcc alone does not bring it.
#pragma once
